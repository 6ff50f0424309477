"""Pairs per second, memory and gradients of DPO training, each way in turn on the same pairs in one process.

`python benchmarks/throughput.py` runs on a laptop in minutes; `--preset pythia-2.8b` is for a GPU. It needs torch and
transformers; TRL is measured where it is installed. The pairs are random tokens with the lengths of Anthropic's
Helpful-Harmless dialogues, or `--data` with a `--tokenizer`; the models have random weights, so nothing is downloaded.

Every way starts from the same weights and takes the same number of optimizer steps on the same batches. Batches are
collated beforehand; all else that a step needs is timed. The columns:
  pairs/s                  from the median over the rounds of each step's time
  computed tokens per pair positions that pass through the policy, padding too, counted at its input embeddings
  peak memory              beyond what was in use before the way began, so without the weights of policy and reference,
                           which stay loaded throughout, also where the reference was computed beforehand
  largest gradient diff.   max |g - g_original| / max |g_original|, the largest over the parameters: first batch, before
                           clipping, in the dtype of the run (without TF32)
  of the matmul peak       on a GPU: operations that a pair needs at least (each distinct token once, the head where a
                           response token is predicted, backward twice the forward, the reference where computed in the
                           step) per second, over the operations per second of a large matrix product in that dtype
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import gzip
import importlib.util
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import preference_loss
from shared_prompt import microbatches, padded_rows, response_logps, shared_rows
from utils import concatenated_inputs, disable_dropout, slice_and_move_batch_for_device

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 5e-7, 10.0
EOS = 0  # token id; also pads

# Characters at these quantiles of the train split of Anthropic/hh-rlhf; the two ends are a guess.
QUANTILES = [0.0, 0.1, 0.5, 0.9, 0.99, 1.0]
HH_CHARACTERS = {
    "prompt": [20, 63, 363, 1101, 2194, 2852],
    "chosen": [8, 31, 111, 384, 827, 1075],
    "rejected": [8, 34, 145, 462, 1041, 1353],
}
CHARACTERS_PER_TOKEN = 4.45

PRESETS = {"pythia-2.8b": {"hidden": 2560, "layers": 32, "heads": 32, "dtype": "bfloat16", "batch_size": 64}}

Pair = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen and rejected response


def progress(message: str):
    """Tell a waiting person what is being computed, without touching the tables on stdout."""
    print(message, file=sys.stderr, flush=True)


# ---- pairs and batches ----------------------------------------------------------------------------------------------


def random_pairs(n: int, args: Namespace) -> list[Pair]:
    """Pairs of random tokens; prompts and responses as long as those of HH, independently of each other."""
    generator = np.random.default_rng(args.seed)
    pairs = []
    for _ in range(n):
        parts = []
        for quantiles in HH_CHARACTERS.values():
            characters = np.exp(np.interp(generator.random(), QUANTILES, np.log(quantiles)))
            n_tokens = max(1, round(characters / CHARACTERS_PER_TOKEN))
            parts.append(generator.integers(EOS + 1, args.vocab, n_tokens).tolist())
        pairs.append(truncated(*parts, EOS, args))
    return pairs


def hh_pairs(n: int, args: Namespace) -> list[Pair]:
    """`n` pairs drawn from a JSON-lines file in the format of Anthropic/hh-rlhf.

    Raises: ValueError if the file has fewer, or the model has no embedding for one of the tokenizer's ids.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    if len(tokenizer) > args.vocab:
        raise ValueError(
            f"--vocab {args.vocab}: the tokenizer has {len(tokenizer)} tokens; use --vocab {len(tokenizer)}"
        )
    opened = gzip.open if str(args.data).endswith(".gz") else open
    with opened(args.data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if len(rows) < n:
        raise ValueError(f"--data {args.data}: {len(rows)} pairs, but {n} are needed; lower --steps or --batch-size")
    pairs = []
    for index in np.random.default_rng(args.seed).permutation(len(rows))[:n]:
        chosen, rejected = rows[index]["chosen"], rows[index]["rejected"]
        end_of_prompt = chosen.rindex("\n\nAssistant:") + len("\n\nAssistant:")
        texts = chosen[:end_of_prompt], chosen[end_of_prompt:], rejected[end_of_prompt:]
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        pairs.append(truncated(*parts, tokenizer.eos_token_id, args))
    return pairs


def truncated(prompt: list[int], chosen: list[int], rejected: list[int], eos: int, args: Namespace) -> Pair:
    """The pair as training cuts it (`preference_datasets.tokenize_batch`, which needs libraries that this file
    doesn't): first the prompt's start, then the end of the responses."""
    longer = max(len(chosen), len(rejected)) + 1
    if len(prompt) + longer > args.max_length:
        prompt = prompt[-args.max_prompt_length :]
    n_most = args.max_length - args.max_prompt_length if len(prompt) + longer > args.max_length else longer
    return prompt, [*chosen, eos][:n_most], [*rejected, eos][:n_most]


def collate(pairs: list[Pair]) -> dict:
    """A batch as `preference_datasets.get_collate_fn` makes it: prompts padded on the left, all else on the right."""
    parts = {"prompt": [prompt for prompt, _, _ in pairs]}
    for side, index in (("chosen", 1), ("rejected", 2)):
        parts[side] = [pair[0] + pair[index] for pair in pairs]
    batch = {"prompt": [""] * len(pairs)}
    for part, sequences in parts.items():
        side = "left" if part == "prompt" else "right"
        ids = [torch.tensor(sequence) for sequence in sequences]
        masks = [torch.ones_like(sequence) for sequence in ids]
        batch[f"{part}_input_ids"] = pad_sequence(ids, True, EOS, padding_side=side)
        batch[f"{part}_attention_mask"] = pad_sequence(masks, True, 0, padding_side=side)
    for part in ("chosen", "rejected"):
        is_prompt = torch.arange(batch[f"{part}_input_ids"].shape[1]) < torch.tensor([[len(p)] for p, _, _ in pairs])
        batch[f"{part}_labels"] = batch[f"{part}_input_ids"].masked_fill(
            is_prompt | (batch[f"{part}_attention_mask"] == 0), -100
        )
    return batch


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What an optimizer step took."""

    seconds: float
    n_positions: int  # computed by the policy with a gradient


class Models:
    """Policy and reference, and a record of the steps in which the policy is trained."""

    def __init__(self, policy: nn.Module, reference: nn.Module):
        self.policy, self.reference = policy, reference  # the reference has the weights that every way starts from
        self.device = policy.device
        self.steps: list[Step] = []
        self.n_positions = n_positions = [0]  # a list, which copies of the policy have in common

        def count(module: nn.Module, inputs: tuple[torch.Tensor]):
            n_positions[0] += inputs[0].numel() if torch.is_grad_enabled() else 0

        policy.get_input_embeddings().register_forward_pre_hook(count)

    def reset(self):
        """The policy as it was at first, and no steps."""
        with torch.no_grad():
            for parameter, initial in zip(self.policy.parameters(), self.reference.parameters(), strict=True):
                parameter.copy_(initial)
        self.policy.zero_grad()
        self.steps = []

    def start_step(self):
        self.n_positions[0] = 0
        self._synchronize()
        self.start = time.perf_counter()

    def end_step(self):
        self._synchronize()
        self.steps.append(Step(time.perf_counter() - self.start, self.n_positions[0]))

    def _synchronize(self):
        if self.device.type == "cuda":  # where calls return before the work is done
            torch.cuda.synchronize()


def build_models(args: Namespace) -> Models:
    """Two equal models with random weights, without dropout."""
    options = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": max(2048, args.max_length),
        "bos_token_id": EOS,
        "eos_token_id": EOS,
    }
    if args.arch in ("gpt_neox", "llama", "qwen3"):
        options["intermediate_size"] = 4 * args.hidden
    if args.arch in ("llama", "qwen3"):
        options |= {"num_key_value_heads": args.heads, "head_dim": args.hidden // args.heads}
    if args.arch == "gptj":
        options["rotary_dim"] = min(64, args.hidden // args.heads)
    torch.manual_seed(args.seed)
    config = transformers.AutoConfig.for_model(args.arch, **options)
    with torch.device(args.device):
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    disable_dropout(policy)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if args.activation_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Models(policy.train(), reference)


# ---- the ways of this repository and the original's -----------------------------------------------------------------


def original_microbatches(batch: dict, n: int, device: str) -> list[dict]:
    """`n` equal parts of a batch, all padded to the longest of the whole batch."""
    return [slice_and_move_batch_for_device(batch, index, n, device) for index in range(n)]


def original_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Log-probabilities as the original computes them: logits of all 2B sequences at every position. (2B,)"""
    inputs = concatenated_inputs(batch)
    ids, mask, labels = (inputs[f"concatenated_{kind}"] for kind in ("input_ids", "attention_mask", "labels"))
    logits = model(ids, attention_mask=mask).logits.to(torch.float32)  # (2B, T, V)
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1]
    loss_mask = labels != -100
    labels[~loss_mask] = 0
    per_token_logps = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)  # (2B, T-1)
    return (per_token_logps * loss_mask).sum(-1)


def padded_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """One sequence a row, the head at response tokens only. (2B,)"""
    return response_logps(model, padded_rows(batch))


def shared_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """One pair a row, the head at response tokens only. (2B,)"""
    return response_logps(model, shared_rows(batch))


def with_reference_logps(batch: dict, models: Models, logps: Callable) -> dict:
    """The batch with the reference's log-probability of its responses in it, (B, 2)."""
    with torch.no_grad():
        return batch | {"reference_logps": torch.stack(logps(models.reference, batch).chunk(2), dim=1)}


def run_steps(
    models: Models, batches: list[dict], args: Namespace, before_clipping: Callable[[], None] | None = None, *,
    split: Callable, logps: Callable, cached_reference: bool = False,
):  # fmt: skip
    """Train on the batches.

    Args:
        before_clipping: called where a step's gradient is complete.
        split: makes microbatches of (batch, least number of them, type of device).
        logps: log-probabilities of a microbatch's responses under a model, chosen before rejected.
    """
    optimizer = torch.optim.RMSprop(models.policy.parameters(), lr=LEARNING_RATE)
    if cached_reference:
        batches = [with_reference_logps(batch, models, logps) for batch in batches]
    for batch in batches:
        models.start_step()
        for part in split(batch, args.microbatch, models.device.type):
            policy_logps = logps(models.policy, part).chunk(2)
            if not cached_reference:
                part = with_reference_logps(part, models, logps)
            reference_logps = part["reference_logps"].unbind(1)
            losses, _, _ = preference_loss(*policy_logps, *reference_logps, beta=BETA)
            (losses.sum() / len(batch["prompt"])).backward()
        if before_clipping:
            before_clipping()
        nn.utils.clip_grad_norm_(models.policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        models.end_step()


# ---- TRL ------------------------------------------------------------------------------------------------------------


class StepTimer(transformers.TrainerCallback):
    """Has each optimizer step recorded; its batch was collated before."""

    def __init__(self, models: Models):
        self.models = models

    def on_step_begin(self, args, state, control, **kwargs):
        self.models.start_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.models.end_step()


@functools.cache
def trl_trainer_class() -> type:
    """TRL's trainer, fed with token ids in a fixed order; what it computes is left alone."""
    from trl import DPOTrainer

    class TokenIdDPOTrainer(DPOTrainer):
        before_clipping = None

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.before_clipping and self.accelerator.sync_gradients:
                self.before_clipping()
            return loss

    return TokenIdDPOTrainer


def trl_inputs(batches: list[dict]) -> dict:
    """The pairs of the batches as TRL's collator takes them, and the tokenizer that its trainer asks for."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for batch in batches:
        prompts = zip(batch["prompt_input_ids"], batch["prompt_attention_mask"].bool(), strict=True)
        columns["prompt_ids"] += [ids[mask].tolist() for ids, mask in prompts]
        for side in ("chosen", "rejected"):
            columns[f"{side}_ids"] += [labels[labels != -100].tolist() for labels in batch[f"{side}_labels"]]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<eos>": EOS}, "<eos>")), eos_token="<eos>", pad_token="<eos>"
    )
    return {"train_dataset": Dataset.from_dict(columns), "processing_class": tokenizer}


def run_trl(
    models: Models, batches: list[dict], args: Namespace, before_clipping: Callable[[], None] | None = None, *,
    tuned: bool, cached_reference: bool = False,
):  # fmt: skip
    """Train on the batches with TRL's `DPOTrainer`.

    Args:
        tuned: dtype, activation checkpointing, optimizer and clipping as in the other ways, instead of its defaults.
    """
    from trl import DPOConfig

    def sharing_weights(model: nn.Module) -> nn.Module:  # TRL and Accelerate patch a model: a throw-away copy
        return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})

    policy = sharing_weights(models.policy)
    options, optimizers = {}, (None, None)
    if tuned:
        options = {
            "bf16": False,
            "gradient_checkpointing": args.activation_checkpointing,
            "max_grad_norm": MAX_GRAD_NORM,
        }
        optimizers = (torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE), None)
    with tempfile.TemporaryDirectory() as output_dir:
        config = DPOConfig(
            output_dir, max_steps=len(batches), per_device_train_batch_size=args.batch_size // args.microbatch,
            gradient_accumulation_steps=args.microbatch, learning_rate=LEARNING_RATE, beta=BETA,
            max_length=args.max_length, precompute_ref_log_probs=cached_reference, use_cpu=models.device.type == "cpu",
            report_to="none", save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        reference = None if cached_reference else sharing_weights(models.reference)
        trainer = trl_trainer_class()(
            policy, reference, config, callbacks=[StepTimer(models)], optimizers=optimizers, **trl_inputs(batches)
        )
        trainer.remove_callback(transformers.PrinterCallback)  # it would print into the table
        trainer.before_clipping = before_clipping
        trainer.train()
        trainer.accelerator.free_memory()


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to train: `run(models, batches, args, before_clipping)`, with its steps recorded in `models`."""

    name: str
    run: Callable
    online_reference: bool = True


OWN = {
    "original": {"split": original_microbatches, "logps": original_logps},
    "padded": {"split": functools.partial(microbatches, shared=False), "logps": padded_logps},
    "shared": {"split": functools.partial(microbatches, shared=True), "logps": shared_logps},
}
WAYS = {
    "original": Way("original", functools.partial(run_steps, **OWN["original"])),
    "padded": Way("padded, response-only head", functools.partial(run_steps, **OWN["padded"])),
    "shared": Way("shared prompt", functools.partial(run_steps, **OWN["shared"])),
    "cached": Way(
        "shared prompt, cached reference",
        functools.partial(run_steps, **OWN["shared"], cached_reference=True),
        online_reference=False,
    ),
    "trl-default": Way("TRL, its defaults", functools.partial(run_trl, tuned=False)),
    "trl": Way("TRL, tuned", functools.partial(run_trl, tuned=True)),
    "trl-cached": Way(
        "TRL, tuned, cached reference",
        functools.partial(run_trl, tuned=True, cached_reference=True),
        online_reference=False,
    ),
}


class PeakMemory:
    """The most bytes in use at once in a `with` block, beyond what was in use before; NaN where it can't be read."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.before, self.peak = device.type == "cuda", math.nan, math.nan

    def __enter__(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        with contextlib.suppress(OSError, AttributeError):  # another system than Linux
            ctypes.CDLL(None).malloc_trim(0)  # what earlier ways have freed would serve this one unseen
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *exception):
        if self.on_gpu:
            self.peak = torch.cuda.max_memory_allocated() - self.before
        elif not math.isnan(self.before):
            self.peak = self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(key: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


@dataclass
class Case:
    """A row of a table: a way on its batches, and what was measured."""

    name: str
    way: Way
    batches: list[dict]
    seconds: list[list[float]] = field(default_factory=list)  # [round][step]
    peak_memory: list[float] = field(default_factory=list)  # [round], bytes
    n_positions: int = 0
    gradient_difference: float = math.nan

    @property
    def n_pairs(self) -> int:
        return sum(len(batch["prompt"]) for batch in self.batches)

    @property
    def seconds_per_pair(self) -> float:
        return sum(statistics.median(step) for step in zip(*self.seconds, strict=True)) / self.n_pairs


def measure(cases: list[Case], models: Models, args: Namespace):
    """Train each case's way on its batches, taking turns in each round."""
    for n_round in range(1, args.repeats + 1):
        for case in cases:
            progress(f"round {n_round} of {args.repeats}: {case.name}")
            models.reset()
            with PeakMemory(models.device) as memory:
                case.way.run(models, case.batches[:1] * args.warmup + case.batches, args)
            timed = models.steps[args.warmup :]
            case.seconds.append([step.seconds for step in timed])
            case.n_positions = sum(step.n_positions for step in timed)
            case.peak_memory.append(memory.peak)


def first_gradients(way: Way, models: Models, batch: dict, args: Namespace) -> dict[str, torch.Tensor]:
    """Every parameter's gradient at the initial weights, in float32 on the CPU."""
    gradients = {}

    def keep():
        for name, parameter in models.policy.named_parameters():
            gradients[name] = parameter.grad.to("cpu", torch.float32, copy=True)

    models.reset()
    way.run(models, [batch], args, before_clipping=keep)
    return gradients


def compare_gradients(cases: list[Case], models: Models, args: Namespace):
    """Note for each case how far its first gradient is from the original's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = first_gradients(WAYS["original"], models, cases[0].batches[0], args)
    for case in cases:
        progress(f"first gradient: {case.name}")
        gradients = first_gradients(case.way, models, case.batches[0], args)
        case.gradient_difference = max(
            ((gradients[name] - g).abs().max() / g.abs().max()).item() for name, g in expected.items()
        )
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training


def matmul_peak(dtype: torch.dtype, n: int = 8192, repeats: int = 20) -> float:
    """Operations per second of a product of two random n x n matrices on the GPU."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    for timed in (3, repeats):  # the first for warming up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(timed):
            a @ b
        torch.cuda.synchronize()
    return 2 * n**3 * repeats / (time.perf_counter() - start)


def needed_operations(pairs: list[Pair], model: nn.Module, online_reference: bool) -> float:
    """Multiplications and additions that training on a pair needs at least, mean over the pairs."""
    config = model.config
    modules = [module for module in model.base_model.modules() if not isinstance(module, nn.Embedding)]
    weights = [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    total = 0
    for prompt, chosen, rejected in pairs:
        n_responses = len(chosen) + len(rejected)
        attended = sum(n * (n + 1) / 2 for n in (len(prompt), len(chosen), len(rejected))) + len(prompt) * n_responses
        total += 2 * sum(w.numel() for w in weights) * (len(prompt) + n_responses)
        total += 2 * model.get_output_embeddings().weight.numel() * n_responses
        total += 4 * config.num_hidden_layers * config.num_attention_heads * head_size * attended
    return (3 + online_reference) * total / len(pairs)


# ---- tables ---------------------------------------------------------------------------------------------------------


def print_table(header: list[str], rows: list[list[str]]):
    print("\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]), flush=True)


def compare_ways(pairs: list[Pair], models: Models, args: Namespace):
    """Measure every way on the same batches and print the table."""
    batches = [collate(pairs[i : i + args.batch_size]) for i in range(0, len(pairs), args.batch_size)]
    cases = [Case(WAYS[key].name, WAYS[key], batches) for key in args.ways]
    compare_gradients(cases, models, args)
    measure(cases, models, args)

    original = next((case for case in cases if case.way is WAYS["original"]), None)
    header = ["way", "pairs/s", "computed tokens per pair", "peak memory, MiB", "times the original's pairs/s",
              "largest gradient difference"]  # fmt: skip
    peak = matmul_peak(models.policy.dtype) if models.device.type == "cuda" else None
    if peak:
        header.append(f"of the matmul peak ({peak / 1e12:.0f} TFLOP/s)")
    rows = []
    for case in cases:
        rows.append([
            case.name,
            f"{1 / case.seconds_per_pair:.3g}",
            f"{case.n_positions / case.n_pairs:.0f}",
            f"{max(case.peak_memory) / 2**20:.0f}",
            f"{original.seconds_per_pair / case.seconds_per_pair:.2f}" if original else "-",
            f"{case.gradient_difference:.1e}",
        ])  # fmt: skip
        if peak:
            operations = needed_operations(pairs, models.policy, case.way.online_reference)
            rows[-1].append(f"{operations / case.seconds_per_pair / peak:.1%}")
    print_table(header, rows)


def compare_batch_sizes(pairs: list[Pair], models: Models, args: Namespace):
    """Measure shared prompts on the same pairs in batches of several sizes and print the table."""
    cases = [
        Case(str(size), WAYS["shared"], [collate(pairs[i : i + size]) for i in range(0, len(pairs), size)])
        for size in args.batch_sizes
    ]
    measure(cases, models, args)
    header = ["batch size", "ms per pair", "of the first", "computed tokens per pair", "peak memory, MiB"]
    rows = [
        [
            case.name,
            f"{1000 * case.seconds_per_pair:.4g}",
            f"{case.seconds_per_pair / cases[0].seconds_per_pair:.2f}",
            f"{case.n_positions / case.n_pairs:.0f}",
            f"{max(case.peak_memory) / 2**20:.0f}",
        ]
        for case in cases
    ]
    print_table(header, rows)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(pairs: list[Pair], models: Models, args: Namespace):
    """Print hardware, versions, model and data: what the figures hold for."""
    if models.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    n_parameters = sum(parameter.numel() for parameter in models.policy.parameters())
    means = [statistics.mean(len(pair[part]) for pair in pairs) for part in range(3)]
    source = args.data or "random tokens, lengths as in HH"
    print(
        f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}; {args.arch}, {args.layers} "
        f"layers, hidden size {args.hidden}, {args.heads} heads, vocabulary {args.vocab}: {n_parameters / 1e6:.1f} M "
        f"parameters in {args.dtype}, {models.policy.config._attn_implementation} attention; "
        f"{len(pairs)} pairs ({source}), mean tokens: prompt {means[0]:.1f}, chosen {means[1]:.1f}, "
        f"rejected {means[2]:.1f}; {args.repeats} rounds\n",
        flush=True,
    )


def parse_args() -> Namespace:
    """The command line's options; those of a preset are defaults."""
    parser = argparse.ArgumentParser(description="Measures DPO training, each way in turn on the same pairs.")
    parser.add_argument("--preset", choices=PRESETS, help="model, dtype and batch size; other options still count")
    parser.add_argument("--arch", default="gpt_neox", choices=["gpt_neox", "llama", "gpt2", "gptj", "qwen3"])
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=50304, help="tokens in the vocabulary")
    parser.add_argument("--dtype", default="float32", help="of weights and computation")
    parser.add_argument(
        "--data", help="JSON lines (.gz too) in the format of Anthropic/hh-rlhf, instead of random tokens"
    )
    parser.add_argument("--tokenizer", help="for --data: a folder or a hub id")
    parser.add_argument("--max-length", type=int, default=512, help="tokens in prompt and response")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens in the prompt of an over-long pair")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--microbatch", type=int, default=1, help="least number of microbatches a batch is cut into")
    parser.add_argument("--activation-checkpointing", action="store_true", help="in all ways")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per way and round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, on the first batch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which the ways take turns")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch-sizes", type=lambda text: [int(size) for size in text.split(",")],
                        help="measure shared prompts alone, at these batch sizes, e.g. 8,16,32,64")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as PyTorch has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**PRESETS.get(parser.parse_known_args()[0].preset, {}))
    args = parser.parse_args()
    if any(size % args.microbatch for size in args.batch_sizes or [args.batch_size]):
        parser.error(f"--microbatch {args.microbatch} does not divide the batch size")
    if args.data and not args.tokenizer:
        parser.error("--data needs --tokenizer")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    if args.threads:
        torch.set_num_threads(args.threads)
    has_trl = importlib.util.find_spec("trl") is not None
    if not has_trl:
        args.ways = [key for key in args.ways if not key.startswith("trl")]
    multiple = math.lcm(*(args.batch_sizes or [args.batch_size]))
    n_pairs = math.ceil(args.steps * args.batch_size / multiple) * multiple
    pairs = hh_pairs(n_pairs, args) if args.data else random_pairs(n_pairs, args)
    models = build_models(args)
    describe(pairs, models, args)
    if args.batch_sizes:
        compare_batch_sizes(pairs, models, args)
        return
    compare_ways(pairs, models, args)
    if not has_trl:
        print("\nTRL is not installed and was left out: pip install trl==1.16.0")


if __name__ == "__main__":
    main()
