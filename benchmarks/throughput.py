"""Speed, memory and gradients of DPO training in several ways, on the same pairs in one process.

`python benchmarks/throughput.py` is for a CPU with 24 GB, most of it for the original's way. `--preset pythia-2.8b` is
for a GPU. Tokens and weights are random; nothing is downloaded. Lengths are those of Anthropic's Helpful-Harmless
dialogues, unless `--data` and `--tokenizer` are given. TRL is measured if it is installed.

All ways start from the same weights and take the same number of steps on the same batches. Collation is not timed;
everything else in a step is. The columns:
  pairs/s                      from each step's median time over the rounds
  computed tokens per pair     positions that pass through the policy, with padding, counted at its input embeddings
  peak memory                  during steps, beyond what was in use before the first step. So it excludes the weights of
                               policy and reference, which stay loaded, even if the reference is cached
  largest gradient difference  max |g - g_original| / max |g_original|, the largest over all parameters, for the first
                               batch, before clipping. Computed in float32, because in bfloat16 the original's rounding
                               errors are as large as some gradients; only TRL with its defaults stays in bfloat16
  of the matmul peak           on a GPU: the operations per second that the pairs need at least, divided by those of a
                               large matrix product in the same dtype. A pair needs a forward pass over each distinct
                               token, with the head at each predicted one; twice that for the backward pass; and a
                               forward pass of the reference unless it is cached
"""

import argparse
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

from acceleration.capacity import microbatch_overhead
from acceleration.layout import Layout
from acceleration.packed_attention import use_packed_attention
from acceleration.prefix_sharing import packed_shared_rows, padded_rows, shared_rows
from acceleration.response_head import response_logps
from acceleration.shadow_weights import ShadowedLinear, shadow_linear_weights
from data.batches import prefetched
from data.microbatches import CPU_OVERHEAD, microbatches
from log_probabilities import concatenated_inputs
from losses import preference_loss
from utils import disable_dropout, slice_and_move_batch_for_device

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 5e-7, 10.0
EOS = 0  # token id of the end token, also used for padding

# Quantiles of the number of characters in HH's prompts, chosen and rejected responses; the two ends are a guess
QUANTILES = [0.0, 0.1, 0.5, 0.9, 0.99, 1.0]
HH_CHARACTERS = [[20, 63, 363, 1101, 2194, 2852], [8, 31, 111, 384, 827, 1075], [8, 34, 145, 462, 1041, 1353]]
CHARACTERS_PER_TOKEN = 4.45

PRESETS = {  # microbatches of 8 pairs, as on each of the original's four GPUs: 64 / (2 microbatches * 4)
    "pythia-2.8b": {
        "hidden": 2560, "layers": 32, "heads": 32, "mixed_precision": True, "batch_size": 64, "microbatch": 8,
    },
}  # fmt: skip

Pair = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen and rejected response


# ---- pairs and batches ----------------------------------------------------------------------------------------------


def random_pairs(n: int, args: Namespace) -> list[Pair]:
    """Return pairs of random tokens, with the lengths of HH's prompts and responses, drawn independently."""
    generator = np.random.default_rng(args.seed)

    def part(quantiles: list[int]) -> list[int]:
        characters = np.exp(np.interp(generator.random(), QUANTILES, np.log(quantiles)))
        return generator.integers(EOS + 1, args.vocab, max(1, round(characters / CHARACTERS_PER_TOKEN))).tolist()

    return [truncated(*map(part, HH_CHARACTERS), EOS, args) for _ in range(n)]


def hh_pairs(n: int, args: Namespace) -> list[Pair]:
    """Draw `n` pairs from a JSON Lines file in the format of Anthropic/hh-rlhf.

    Raises: ValueError if it has fewer, or if the tokenizer has more tokens than the model.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    if len(tokenizer) > args.vocab:
        raise ValueError(f"--vocab {args.vocab} is too small for the tokenizer: use --vocab {len(tokenizer)}")
    with (gzip.open if args.data.endswith(".gz") else open)(args.data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if len(rows) < n:
        raise ValueError(f"--data {args.data}: {len(rows)} pairs, but {n} are needed; lower --steps or --batch-size")
    pairs = []
    for index in np.random.default_rng(args.seed).permutation(len(rows))[:n]:
        chosen, rejected = rows[index]["chosen"], rows[index]["rejected"]
        start = chosen.rindex("\n\nAssistant:") + len("\n\nAssistant:")
        ids = tokenizer([chosen[:start], chosen[start:], rejected[start:]], add_special_tokens=False)["input_ids"]
        pairs.append(truncated(*ids, tokenizer.eos_token_id, args))
    return pairs


def truncated(prompt: list[int], chosen: list[int], rejected: list[int], eos: int, args: Namespace) -> Pair:
    """Truncate a pair as in training. `data.tokenization.tokenize_batch` does the same, but imports more than torch."""
    longer = max(len(chosen), len(rejected)) + 1
    if len(prompt) + longer > args.max_length:
        prompt = prompt[-args.max_prompt_length :]
    limit = args.max_length - args.max_prompt_length if len(prompt) + longer > args.max_length else longer
    return prompt, [*chosen, eos][:limit], [*rejected, eos][:limit]


def collate(pairs: list[Pair]) -> dict:
    """Collate pairs like `data.tokenization.get_collate_fn`, without the keys that only sampling needs."""
    batch = {"prompt": [""] * len(pairs), "pair": pairs}
    for side, index in (("chosen", 1), ("rejected", 2)):
        ids = [torch.tensor(pair[0] + pair[index]) for pair in pairs]
        labels = [torch.tensor([-100] * len(pair[0]) + pair[index]) for pair in pairs]
        batch[f"{side}_input_ids"] = pad_sequence(ids, True, EOS)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], True, 0)
        batch[f"{side}_labels"] = pad_sequence(labels, True, -100)
    return batch


def split_into_batches(pairs: list[Pair], batch_size: int) -> list[dict]:
    return [collate(pairs[start : start + batch_size]) for start in range(0, len(pairs), batch_size)]


# ---- models ---------------------------------------------------------------------------------------------------------


class Training(transformers.TrainerCallback):
    """Policy and reference, with a record of the policy's training steps, whatever trainer takes them."""

    def __init__(self, policy: nn.Module, reference: nn.Module):
        self.policy, self.reference = policy, reference  # every way starts from the reference's weights
        self.device = policy.device
        self.n_positions = n_positions = [0]  # positions computed by the policy; a list, so that its copies share it

        def count(module: nn.Module, inputs: tuple[torch.Tensor]):
            n_positions[0] += inputs[0].numel() if torch.is_grad_enabled() else 0

        policy.get_input_embeddings().register_forward_pre_hook(count)

    def reset(self, keep_gradients: bool = False):
        """Restore the policy's initial weights and forget the recorded steps."""
        with torch.no_grad():
            for parameter, initial in zip(self.policy.parameters(), self.reference.parameters(), strict=True):
                parameter.copy_(initial)
        self.policy.zero_grad()
        self.steps: list[tuple[float, int]] = []  # each step's seconds and positions
        self.keep_gradients, self.gradients = keep_gradients, {}

    def on_step_begin(self, *args, **kwargs):
        """Called when the batch is ready and nothing is computed yet."""
        if not self.steps:
            reset_peak_memory(self.device)
        self.n_positions[0] = 0
        self.start = self._now()

    def on_pre_optimizer_step(self, *args, **kwargs):
        """Called when the gradient is complete."""
        if self.keep_gradients:
            for name, parameter in self.policy.named_parameters():
                self.gradients[name] = parameter.grad.to("cpu", torch.float32, copy=True)

    def on_step_end(self, *args, **kwargs):
        """Called when the weights are updated and the gradient is freed."""
        self.steps.append((self._now() - self.start, self.n_positions[0]))

    def _now(self) -> float:
        if self.device.type == "cuda":  # kernels run asynchronously
            torch.cuda.synchronize()
        return time.perf_counter()


def build_models(args: Namespace) -> Training:
    """Build two equal models with random weights, without dropout."""
    head_size = args.hidden // args.heads
    options = {
        "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.heads,
        "head_dim": head_size, "rotary_dim": min(64, head_size), "max_position_embeddings": max(2048, args.max_length),
        "bos_token_id": EOS, "eos_token_id": EOS,
    }  # fmt: skip
    torch.manual_seed(args.seed)
    config = transformers.AutoConfig.for_model(args.arch, **options)
    with torch.device(args.device):
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    disable_dropout(policy)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if args.mixed_precision:
        reference.bfloat16()
    if args.activation_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Training(policy.train(), reference)


# ---- this repository's ways and the original's ----------------------------------------------------------------------


def original_microbatches(batch: dict, training: Training, args: Namespace) -> list[dict]:
    """Split a batch into equal parts, all padded to the longest sequence of the whole batch."""
    return [slice_and_move_batch_for_device(batch, i, args.microbatch, training.device) for i in range(args.microbatch)]


def planned_microbatches(batch: dict, training: Training, args: Namespace, layout: Layout) -> list[dict]:
    """Split a batch as `trainers.py` does, and prepare the rows of each part."""
    min_parts = 1 if layout.is_packed and args.max_tokens else args.microbatch
    overhead = CPU_OVERHEAD if training.device.type == "cpu" else microbatch_overhead(training.policy)
    parts = microbatches(batch, min_parts, layout.is_shared, overhead, layout.is_packed, args.max_tokens)
    return [layout.prepare(part, pin_memory=training.device.type == "cuda") for part in parts]


def original_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Compute log-probabilities as the original does, but with the current attention of Transformers: (2B,).

    There are two sequences per pair, with logits and their log-softmax at every position.
    """
    inputs = concatenated_inputs(batch)
    ids, mask, labels = (inputs[f"concatenated_{kind}"] for kind in ("input_ids", "attention_mask", "labels"))
    logits = model(ids, attention_mask=mask).logits.to(torch.float32)[:, :-1]  # (2B, T-1, V)
    labels = labels[:, 1:].clone()
    loss_mask = labels != -100
    labels[~loss_mask] = 0
    per_token_logps = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)  # (2B, T-1)
    return (per_token_logps * loss_mask).sum(-1)


def with_reference_logps(batch: dict, training: Training, logps: Callable) -> dict:
    """Return the batch with the reference's log-probabilities added: (B, 2), for chosen and rejected responses."""
    with torch.no_grad():
        return batch | {"reference_logps": torch.stack(logps(training.reference, batch).chunk(2), dim=1)}


def train_ours(
    training: Training, batches: list[dict], args: Namespace, split: Callable, logps: Callable,
    cached_reference: bool = False,
):  # fmt: skip
    """Train on the batches with a loop like that of `trainers.py`.

    Args:
        split: (batch, training, args) to a list of microbatches.
        logps: (model, microbatch) to the log-probabilities of its responses, chosen before rejected.
    """
    optimizer = torch.optim.RMSprop(training.policy.parameters(), lr=LEARNING_RATE)
    if cached_reference:
        batches = [with_reference_logps(batch, training, logps) for batch in batches]
    for batch, parts in prefetched(((batch, split(batch, training, args)) for batch in batches), n_ahead=2):
        training.on_step_begin()
        for part in parts:
            with torch.autocast(training.device.type, torch.bfloat16, enabled=args.mixed_precision):
                policy_logps = logps(training.policy, part).chunk(2)
            if not cached_reference:
                part = with_reference_logps(part, training, logps)
            losses, _, _ = preference_loss(*policy_logps, *part["reference_logps"].unbind(1), beta=BETA)
            (losses.sum() / len(batch["pair"])).backward()
        training.on_pre_optimizer_step()
        nn.utils.clip_grad_norm_(training.policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        training.on_step_end()


# ---- TRL ------------------------------------------------------------------------------------------------------------


def trl_data(batches: list[dict]) -> dict:
    """Return the pairs in the format of TRL's collator, and a tokenizer, from which it reads the padding token."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    parts = zip(*(pair for batch in batches for pair in batch["pair"]), strict=True)
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts, strict=True))
    vocabulary = Tokenizer(WordLevel({"<eos>": EOS}, "<eos>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<eos>", pad_token="<eos>")
    return {"train_dataset": Dataset.from_dict(columns), "processing_class": tokenizer}


def train_with_trl(
    training: Training, batches: list[dict], args: Namespace, tuned: bool, cached_reference: bool = False
):
    """Train on the batches with TRL's `DPOTrainer`.

    Args:
        tuned: use the dtype, activation checkpointing, optimizer and clipping of the other ways, not TRL's defaults.
    """
    from trl import DPOConfig, DPOTrainer

    class TokenIdDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokenized already

    def copy_sharing_weights(model: nn.Module) -> nn.Module:  # a copy, because TRL and Accelerate patch the model
        return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})

    policy = copy_sharing_weights(training.policy)
    reference = None if cached_reference else copy_sharing_weights(training.reference)
    options, optimizer = {}, None
    if tuned:
        options = {"bf16": args.mixed_precision, "gradient_checkpointing": args.activation_checkpointing}
        if training.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            options["use_liger_kernel"] = True
        options["max_grad_norm"] = MAX_GRAD_NORM
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE)
    if training.keep_gradients:
        options["max_grad_norm"] = 0.0  # don't clip: TRL has no callback between the backward pass and clipping
    with tempfile.TemporaryDirectory() as output_dir:
        config = DPOConfig(
            output_dir, max_steps=len(batches), per_device_train_batch_size=args.batch_size // args.microbatch,
            gradient_accumulation_steps=args.microbatch, learning_rate=LEARNING_RATE, beta=BETA,
            max_length=args.max_length, precompute_ref_log_probs=cached_reference, train_sampling_strategy="sequential",
            use_cpu=training.device.type == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = TokenIdDPOTrainer(
            policy, reference, config, callbacks=[training], optimizers=(optimizer, None), **trl_data(batches)
        )
        trainer.remove_callback(transformers.PrinterCallback)  # or it would print into our table
        trainer.train()
        trainer.accelerator.free_memory()


# ---- measuring ------------------------------------------------------------------------------------------------------


def training_with(make_rows: Callable, **options) -> Callable:
    """Return a function that trains as `trainers.py` does with one of its layouts."""
    layout = Layout(make_rows, whole_logits=False)

    def run(training: Training, batches: list[dict], args: Namespace):
        models = [training.policy, training.reference]
        for model in models if layout.is_packed else []:
            use_packed_attention(model)
        if args.mixed_precision:
            shadow_linear_weights(training.policy)
        try:
            train_ours(training, batches, args, functools.partial(planned_microbatches, layout=layout),
                    lambda model, batch: response_logps(model, layout.rows(batch)), **options)  # fmt: skip
        finally:
            for model in models if layout.is_packed else []:
                use_packed_attention(model, False)
            for module in training.policy.modules():
                if type(module) is ShadowedLinear:
                    module.__class__ = nn.Linear
                    module.__dict__.pop("_copies", None)

    return run


WAYS = {  # key: (name, True if the reference is cached, function that trains on (training, batches, args))
    "original": ("original", False, functools.partial(train_ours, split=original_microbatches, logps=original_logps)),
    "padded": ("padded, response-only head", False, training_with(padded_rows)),
    "shared": ("shared prompt", False, training_with(shared_rows)),
    "packed": ("shared prompt, packed", False, training_with(packed_shared_rows)),
    "cached": ("shared prompt, cached reference", True, training_with(shared_rows, cached_reference=True)),
    "packed-cached": (
        "shared prompt, packed, cached reference", True, training_with(packed_shared_rows, cached_reference=True)
    ),
    "trl-default": ("TRL, its defaults", False, functools.partial(train_with_trl, tuned=False)),
    "trl": ("TRL, tuned", False, functools.partial(train_with_trl, tuned=True)),
    "trl-cached": (
        "TRL, tuned, cached reference", True, functools.partial(train_with_trl, tuned=True, cached_reference=True)
    ),
}  # fmt: skip


@dataclass
class Case:
    """A row of the table: a way to train, the batches, and the measurements."""

    name: str
    cached_reference: bool
    run: Callable
    batches: list[dict]
    seconds: list[list[float]] = field(default_factory=list)  # [round][step]
    peak_memory: float = 0.0  # bytes
    tokens_per_pair: float = math.nan
    gradient_difference: float = math.nan

    @property
    def n_pairs(self) -> int:
        return sum(len(batch["pair"]) for batch in self.batches)

    @property
    def pairs_per_second(self) -> float:
        return self.n_pairs / sum(statistics.median(step) for step in zip(*self.seconds, strict=True))


def measure(cases: list[Case], training: Training, args: Namespace):
    """Train each case on its batches; in every round, the cases take turns."""
    for n_round in range(1, args.repeats + 1):
        for case in cases:
            print(f"round {n_round} of {args.repeats}: {case.name}", file=sys.stderr, flush=True)
            training.reset()
            in_use = reset_peak_memory(training.device)
            case.run(training, case.batches[:1] * args.warmup + case.batches, args)
            case.peak_memory = max(case.peak_memory, peak_memory(training.device) - in_use)
            seconds, n_positions = zip(*training.steps[args.warmup :], strict=True)
            case.seconds.append(seconds)
            case.tokens_per_pair = sum(n_positions) / case.n_pairs


def resident_bytes(key: str) -> float:
    """Return this process's memory by its key in /proc/self/status; NaN if there is no such file."""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().split(f"{key}:")[1].split()[0]) if status.exists() else math.nan


def reset_peak_memory(device: torch.device) -> float:
    """Start counting peak memory from now on; return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back: used again, it would not raise the peak
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
    return resident_bytes("VmRSS")


def peak_memory(device: torch.device) -> float:
    """Return the most bytes in use since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM")


def compare_gradients(cases: list[Case], training: Training, args: Namespace):
    """Compute how far each case's first gradient is from the original's."""
    if training.reference.dtype == torch.bfloat16:
        args = Namespace(**vars(args) | {"mixed_precision": False})
        training = Training(copy.deepcopy(training.policy).float(), copy.deepcopy(training.reference).float())
        if args.batch_size % (2 * args.microbatch) == 0:  # float32 activations need smaller microbatches
            args = Namespace(**vars(args) | {"microbatch": 2 * args.microbatch})
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = None
    for case in [Case(*WAYS["original"], cases[0].batches), *cases]:
        print(f"first gradient: {case.name}", file=sys.stderr, flush=True)
        training.reset(keep_gradients=True)
        case.run(training, case.batches[:1], args)
        expected = expected or training.gradients
        differences = [
            (training.gradients[name] - g).abs().max() / g.abs().max().clamp(min=1e-30) for name, g in expected.items()
        ]
        case.gradient_difference = max(differences).item()
    training.reset()
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training


def matmul_peak(dtype: torch.dtype, n: int = 8192, repeats: int = 20) -> float:
    """Measure the operations per second of the product of two random n x n matrices on the GPU."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    for n_products in (3, repeats):  # the first round warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n_products):
            a @ b
        torch.cuda.synchronize()
    return 2 * n**3 * repeats / (time.perf_counter() - start)


def needed_operations(pairs: list[Pair], model: nn.Module, cached_reference: bool) -> float:
    """Return the least number of floating-point operations to train on a pair, averaged over the pairs."""
    config = model.config
    modules = [module for module in model.base_model.modules() if not isinstance(module, nn.Embedding)]
    n_weights = sum(p.numel() for module in modules for p in module.parameters(recurse=False) if p.ndim == 2)
    n_head_weights = model.get_output_embeddings().weight.numel()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    total = 0
    for prompt, *responses in pairs:
        n_prompt, n_responses = len(prompt), sum(map(len, responses))
        n_attended = n_prompt * n_responses + sum(n * (n + 1) / 2 for n in (n_prompt, *map(len, responses)))
        total += 2 * n_weights * (n_prompt + n_responses) + 2 * n_head_weights * n_responses
        total += 4 * config.num_hidden_layers * config.num_attention_heads * head_size * n_attended
    return (3 if cached_reference else 4) * total / len(pairs)


# ---- command line ---------------------------------------------------------------------------------------------------


def description(pairs: list[Pair], training: Training, args: Namespace) -> str:
    """Describe the hardware, versions, model and data that the figures are for."""
    if training.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
        hardware = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    n_parameters = sum(parameter.numel() for parameter in training.policy.parameters())
    prompt, chosen, rejected = (statistics.mean(len(pair[part]) for pair in pairs) for part in range(3))
    precision = f"{args.dtype}{', computed in bfloat16' * args.mixed_precision}"
    return (
        f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}; {args.arch}, hidden size "
        f"{args.hidden}, {args.layers} layers, {args.heads} heads, vocabulary {args.vocab}: {n_parameters / 1e6:.1f} M "
        f"parameters in {precision}, attention: {training.policy.config._attn_implementation}; {len(pairs)} pairs of "
        f"{args.data or 'random tokens'}, mean tokens: prompt {prompt:.1f}, chosen {chosen:.1f}, rejected "
        f"{rejected:.1f}; batches of {args.batch_sizes or args.batch_size} pairs, microbatches at least "
        f"{args.microbatch}; rounds: {args.repeats}"
    )


def print_table(cases: list[Case], pairs: list[Pair], training: Training):
    """Print the measurements as a Markdown table, with ratios to the first row."""
    header = ["way", "pairs/s", "ms per pair", "computed tokens per pair", "peak memory, MiB"]
    header += [f"pairs/s over {cases[0].name}", "largest gradient difference"]
    peak = matmul_peak(training.reference.dtype) if training.device.type == "cuda" else None
    if peak:
        header.append(f"of the matmul peak, {peak / 1e12:.0f} TFLOP/s")
    rows = [header, ["---"] * len(header)]
    for case in cases:
        speed = case.pairs_per_second
        row = [case.name, f"{speed:.3g}", f"{1000 / speed:.3g}", f"{case.tokens_per_pair:.0f}"]
        row += [f"{case.peak_memory / 2**20:.0f}", f"{speed / cases[0].pairs_per_second:.2f}"]
        row.append("-" if math.isnan(case.gradient_difference) else f"{case.gradient_difference:.1e}")
        if peak:
            row.append(f"{speed * needed_operations(pairs, training.policy, case.cached_reference) / peak:.1%}")
        rows.append(row)
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)


def write_json(path: str, cases: list[Case], pairs: list[Pair], training: Training, args: Namespace):
    """Write the measurements and the description of what they are for."""
    rows = [
        {"way": case.name, "pairs_per_second": case.pairs_per_second, "tokens_per_pair": case.tokens_per_pair,
         "peak_memory_bytes": case.peak_memory, "gradient_difference": case.gradient_difference,
         "needed_operations_per_second":
             case.pairs_per_second * needed_operations(pairs, training.policy, case.cached_reference)}
        for case in cases
    ]  # fmt: skip
    Path(path).write_text(json.dumps({"on": description(pairs, training, args), "ways": rows}, indent=1))


def parse_args() -> Namespace:
    """Parse the command line; a preset changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="defaults for model, dtype, batch size and microbatches")
    parser.add_argument("--arch", default="gpt_neox", choices=["gpt_neox", "llama", "gpt2", "gptj", "qwen3"])
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=50304, help="tokens in the vocabulary")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--mixed-precision", action="store_true", help="keep the policy in float32 and compute it in "
                        "bfloat16 under autocast, with the reference in bfloat16")  # fmt: skip
    parser.add_argument(
        "--data", help="JSON Lines (or .gz) in the format of Anthropic/hh-rlhf, instead of random tokens"
    )
    parser.add_argument("--tokenizer", help="tokenizer for --data: a folder or a hub id")
    parser.add_argument("--max-length", type=int, default=512, help="most tokens in prompt and response")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="most tokens in the prompt of a long pair")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--batch-sizes", help="measure only shared prompts, with these batch sizes, e.g. 8,16,32")
    parser.add_argument("--microbatch", type=int, default=1, help="least number of microbatches in a batch")
    parser.add_argument("--max-tokens", type=int, help="most tokens in a microbatch (not for the original and TRL)")
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--activation-checkpointing", action="store_true", help="use it in all ways")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per way and round")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them, on the first batch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which the ways take turns")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; by default as many as PyTorch chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**PRESETS.get(parser.parse_known_args()[0].preset, {}))
    args = parser.parse_args()
    args.batch_sizes = [int(size) for size in args.batch_sizes.split(",")] if args.batch_sizes else None
    if any(size % args.microbatch for size in args.batch_sizes or [args.batch_size]):
        parser.error(f"--microbatch {args.microbatch} does not divide the batch size")
    if args.data and not args.tokenizer:
        parser.error("--data needs --tokenizer")
    args.has_trl = importlib.util.find_spec("trl") is not None
    args.ways = [key for key in args.ways if args.has_trl or not key.startswith("trl")]
    if not args.ways:
        parser.error("TRL is not installed: pip install trl==1.16.0")
    return args


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    torch.set_num_threads(args.threads or torch.get_num_threads())
    multiple = math.lcm(*(args.batch_sizes or [args.batch_size]))
    n_pairs = math.ceil(args.steps * args.batch_size / multiple) * multiple
    pairs = hh_pairs(n_pairs, args) if args.data else random_pairs(n_pairs, args)
    training = build_models(args)
    print(description(pairs, training, args), end="\n\n", flush=True)
    if args.batch_sizes:
        name, *way = WAYS["shared"]
        cases = [Case(f"{name}, batches of {n}", *way, split_into_batches(pairs, n)) for n in args.batch_sizes]
    else:
        batches = split_into_batches(pairs, args.batch_size)
        cases = [Case(*WAYS[key], batches) for key in args.ways]
        compare_gradients(cases, training, args)
    measure(cases, training, args)
    print_table(cases, pairs, training)
    if args.json:
        write_json(args.json, cases, pairs, training, args)
    if not (args.has_trl or args.batch_sizes):
        print("\nTRL is not installed, so it was not measured: pip install trl==1.16.0")


if __name__ == "__main__":
    main()
