"""Speed, memory and gradients of DPO training in several ways, on the same pairs in one process.

`python benchmarks/throughput.py` is for a CPU with 24 GB, most of which the original's way needs. `--preset
pythia-2.8b` is for a GPU. Tokens and weights are random; nothing is downloaded. Prompts and responses are as long as in
Anthropic's Helpful-Harmless dialogues. TRL is measured if it is installed.

All ways start from the same weights and take the same number of steps on the same batches. Forward and backward passes
and the update are timed; collating and preparing a batch is not. The columns:
  pairs/s                      from each step's median time over the rounds
  computed tokens per pair     positions that pass through the policy, with padding, counted at its input embeddings
  peak memory                  during steps, minus the memory in use before the first step, so without the weights of
                               policy and reference, which are both loaded, also if the reference is cached
  largest gradient difference  max |g - g_original| / max |g_original|, the largest over all parameters, for the first
                               batch, before clipping. Computed in float32, because in bfloat16 the original's rounding
                               errors are as large as some gradients; only TRL with its defaults stays in bfloat16
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
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

import torch
import transformers
from common import EOS, collate, print_header, print_row, process_memory, random_pairs, reset_peak_memory
from torch import nn

from acceleration.capacity import microbatch_overhead
from acceleration.layout import Layout
from acceleration.packed_attention import packed_attention_used
from acceleration.response_head import response_logps
from acceleration.shadow_weights import shadow_linear_weights, unshadow_linear_weights
from data.batches import prefetched
from data.microbatches import CPU_OVERHEAD, microbatches
from log_probabilities import concatenated_inputs
from losses import preference_loss
from utils import disable_dropout, slice_and_move_batch_for_device

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 5e-7, 10.0

PRESETS = {  # microbatches of 8 pairs, as on each of the original's four GPUs: 64 / (2 microbatches * 4)
    "pythia-2.8b": {
        "hidden": 2560, "layers": 32, "heads": 32, "mixed_precision": True, "batch_size": 64, "n_microbatches": 8,
    },
}  # fmt: skip


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """A policy and its reference, from whose weights each way to train starts."""

    policy: nn.Module
    reference: nn.Module

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def restore(self):
        """Give the policy the reference's weights: its initial ones (with mixed precision, rounded to bfloat16)."""
        with torch.no_grad():
            for parameter, initial in zip(self.policy.parameters(), self.reference.parameters(), strict=True):
                parameter.copy_(initial)
        self.policy.zero_grad()


class StepRecorder(transformers.TrainerCallback):
    """Records a policy's training steps inside the block, whatever trainer takes them.

    `steps` gets each step's seconds and positions; `gradients` holds the last step's, if they are kept.
    """

    def __init__(self, policy: nn.Module, keep_gradients: bool = False):
        self.policy, self.keep_gradients = policy, keep_gradients
        self.steps: list[tuple[float, int]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "StepRecorder":
        def count(module: nn.Module, inputs: tuple[torch.Tensor]):  # also called in deep copies of the policy
            self.n_positions += inputs[0].numel() if torch.is_grad_enabled() else 0

        self.n_positions = 0
        self.hook = self.policy.get_input_embeddings().register_forward_pre_hook(count)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def on_step_begin(self, *args, **kwargs):
        """Called when the batch is ready and nothing is computed yet."""
        if not self.steps:
            reset_memory_peak(self.policy.device)
        self.n_positions = 0
        self.start = self._now()

    def on_pre_optimizer_step(self, *args, **kwargs):
        """Called when the gradient is complete."""
        if self.keep_gradients:
            for name, parameter in self.policy.named_parameters():
                self.gradients[name] = parameter.grad.to("cpu", torch.float32, copy=True)

    def on_step_end(self, *args, **kwargs):
        """Called when the weights are updated and the gradient is freed."""
        self.steps.append((self._now() - self.start, self.n_positions))

    def _now(self) -> float:
        if self.policy.device.type == "cuda":  # kernels run asynchronously
            torch.cuda.synchronize()
        return time.perf_counter()


def reset_memory_peak(device: torch.device) -> float:
    """Reset the peak of a device's memory; return the bytes in use."""
    in_use = reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        in_use = torch.cuda.memory_allocated()
    return in_use


def memory_peak(device: torch.device) -> float:
    """Return the most bytes in use since `reset_memory_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else process_memory("VmHWM")


def build_models(args: Namespace) -> Models:
    """Build two models with the same random weights, without dropout; mixed precision rounds the reference's."""
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
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return Models(policy.train(), reference)


# ---- this repository's ways and the original's ----------------------------------------------------------------------


def original_microbatches(batch: dict, models: Models, args: Namespace) -> list[dict]:
    """Split a batch into equal parts, all padded to the longest sequence of the whole batch."""
    n = args.n_microbatches
    return [slice_and_move_batch_for_device(batch, number, n, models.device) for number in range(n)]


def planned_microbatches(batch: dict, models: Models, args: Namespace, layout: Layout) -> list[dict]:
    """Split a batch as `trainers.py` does, and prepare the rows of each part."""
    min_parts = 1 if layout.is_packed and args.max_tokens else args.n_microbatches
    overhead = CPU_OVERHEAD if models.device.type == "cpu" else microbatch_overhead(models.policy)
    parts = microbatches(batch, min_parts, layout.shares_prompts, overhead, layout.is_packed, args.max_tokens)
    return [layout.prepare(part, pin_memory=models.device.type == "cuda") for part in parts]


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


def with_reference_logps(batch: dict, models: Models, logps: Callable) -> dict:
    """Return the batch with the reference's log-probabilities added: (B, 2), for chosen and rejected responses."""
    with torch.no_grad():
        return batch | {"reference_logps": torch.stack(logps(models.reference, batch).chunk(2), dim=1)}


def train_by_loop(
    models: Models, recorder: StepRecorder, batches: list[dict], args: Namespace, split: Callable, logps: Callable,
    cached_reference: bool = False,
):  # fmt: skip
    """Train on the batches with a loop like that of `trainers.py`.

    Args:
        split: (batch, models, args) to a list of microbatches.
        logps: (model, microbatch) to the log-probabilities of its responses, chosen before rejected.
    """
    optimizer = torch.optim.RMSprop(models.policy.parameters(), lr=LEARNING_RATE)
    if cached_reference:
        batches = [with_reference_logps(batch, models, logps) for batch in batches]
    for batch, parts in prefetched(((batch, split(batch, models, args)) for batch in batches), n_ahead=2):
        recorder.on_step_begin()
        for part in parts:
            with torch.autocast(models.device.type, torch.bfloat16, enabled=args.mixed_precision):
                policy_logps = logps(models.policy, part).chunk(2)
            if not cached_reference:
                part = with_reference_logps(part, models, logps)
            losses, _, _ = preference_loss(*policy_logps, *part["reference_logps"].unbind(1), beta=BETA)
            (losses.sum() / len(batch["pairs"])).backward()
        recorder.on_pre_optimizer_step()
        nn.utils.clip_grad_norm_(models.policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recorder.on_step_end()


def train_in_layout(
    models: Models, recorder: StepRecorder, batches: list[dict], args: Namespace, layout: Layout, **options
):
    """Train as `trainers.py` does with one of its layouts; afterwards the models are as before, but for the weights."""
    with contextlib.ExitStack() as stack:
        if args.mixed_precision:
            shadow_linear_weights(models.policy)
            stack.callback(unshadow_linear_weights, models.policy)
        for model in (models.policy, models.reference) if layout.is_packed else ():
            stack.enter_context(packed_attention_used(model))
        train_by_loop(models, recorder, batches, args, functools.partial(planned_microbatches, layout=layout),
                      lambda model, batch: response_logps(model, layout.rows(batch)), **options)  # fmt: skip


# ---- TRL ------------------------------------------------------------------------------------------------------------


def trl_data(batches: list[dict]) -> dict:
    """Return the pairs in the format of TRL's collator, and a tokenizer, from which it reads the padding token."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    pairs = [pair for batch in batches for pair in batch["pairs"]]
    columns = {"prompt_ids": [pair["prompt_input_ids"] for pair in pairs]}
    for side in ("chosen", "rejected"):
        columns[f"{side}_ids"] = [pair[f"{side}_input_ids"][len(pair["prompt_input_ids"]) :] for pair in pairs]
    vocabulary = Tokenizer(WordLevel({"<eos>": EOS}, "<eos>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<eos>", pad_token="<eos>")
    return {"train_dataset": Dataset.from_dict(columns), "processing_class": tokenizer}


def train_with_trl(
    models: Models, recorder: StepRecorder, batches: list[dict], args: Namespace, tuned: bool,
    cached_reference: bool = False,
):  # fmt: skip
    """Train on the batches with TRL's `DPOTrainer`.

    Args:
        tuned: use the other ways' dtype, activation checkpointing, optimizer and clipping instead of TRL's defaults.
    """
    from trl import DPOConfig, DPOTrainer

    class TokenIdDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokenized already

    def copy_sharing_weights(model: nn.Module) -> nn.Module:  # a copy, because TRL and Accelerate patch the model
        return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})

    policy = copy_sharing_weights(models.policy)
    reference = None if cached_reference else copy_sharing_weights(models.reference)
    options, optimizer = {}, None
    if tuned:
        options = {"bf16": args.mixed_precision, "gradient_checkpointing": args.activation_checkpointing}
        if models.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            options["use_liger_kernel"] = True
        options["max_grad_norm"] = MAX_GRAD_NORM
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE)
    if recorder.keep_gradients:
        options["max_grad_norm"] = 0.0  # don't clip: TRL has no callback between the backward pass and clipping
    with tempfile.TemporaryDirectory() as output_dir:
        config = DPOConfig(
            output_dir, max_steps=len(batches), per_device_train_batch_size=args.batch_size // args.n_microbatches,
            gradient_accumulation_steps=args.n_microbatches, learning_rate=LEARNING_RATE, beta=BETA,
            max_length=args.max_length, precompute_ref_log_probs=cached_reference, train_sampling_strategy="sequential",
            use_cpu=models.device.type == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = TokenIdDPOTrainer(
            policy, reference, config, callbacks=[recorder], optimizers=(optimizer, None), **trl_data(batches)
        )
        trainer.remove_callback(transformers.PrinterCallback)  # or it would print into our table
        trainer.train()
        trainer.accelerator.free_memory()


# ---- measuring ------------------------------------------------------------------------------------------------------

WAYS = {  # name in the table, function that trains on (models, recorder, batches, args), its further arguments
    "original": ("original", train_by_loop, {"split": original_microbatches, "logps": original_logps}),
    "padded": ("padded, response-only head", train_in_layout, {"layout": Layout()}),
    "shared": ("shared prompt", train_in_layout, {"layout": Layout(shares_prompts=True)}),
    "packed": ("shared prompt, packed", train_in_layout, {"layout": Layout(shares_prompts=True, is_packed=True)}),
    "cached": ("shared prompt, cached reference", train_in_layout,
               {"layout": Layout(shares_prompts=True), "cached_reference": True}),
    "packed-cached": ("shared prompt, packed, cached reference", train_in_layout,
                      {"layout": Layout(shares_prompts=True, is_packed=True), "cached_reference": True}),
    "trl-default": ("TRL, its defaults", train_with_trl, {"tuned": False}),
    "trl": ("TRL, tuned", train_with_trl, {"tuned": True}),
    "trl-cached": ("TRL, tuned, cached reference", train_with_trl, {"tuned": True, "cached_reference": True}),
}  # fmt: skip


@dataclass
class Case:
    """A row of the table: a way to train, and its measurements."""

    way: str  # a key of `WAYS`
    seconds: list[list[float]] = field(default_factory=list)  # [round][step]
    peak_memory: float = 0.0  # bytes
    n_positions: int = 0  # in all steps of a round
    gradient_difference: float = 0.0

    @property
    def name(self) -> str:
        return WAYS[self.way][0]

    def run(self, models: Models, recorder: StepRecorder, batches: list[dict], args: Namespace):
        """Train on the batches."""
        _, train, options = WAYS[self.way]
        train(models, recorder, batches, args, **options)

    @property
    def median_seconds(self) -> float:
        """The time of all steps of a round, each the median over the rounds."""
        return sum(statistics.median(step) for step in zip(*self.seconds, strict=True))


def measure(cases: list[Case], models: Models, batches: list[dict], args: Namespace):
    """Train in each way on the batches; in every round, the ways take turns."""
    for n_round in range(1, args.repeats + 1):
        for case in cases:
            print(f"round {n_round} of {args.repeats}: {case.name}", file=sys.stderr, flush=True)
            models.restore()
            in_use = reset_memory_peak(models.device)
            with StepRecorder(models.policy) as recorder:
                case.run(models, recorder, batches[:1] * args.warmup + batches, args)
            case.peak_memory = max(case.peak_memory, memory_peak(models.device) - in_use)
            seconds, n_positions = zip(*recorder.steps[args.warmup :], strict=True)
            case.seconds.append(seconds)
            case.n_positions = sum(n_positions)


def compare_gradients(cases: list[Case], models: Models, batch: dict, args: Namespace):
    """Compute how far each way's first gradient is from the original's."""
    if models.reference.dtype == torch.bfloat16:
        args = Namespace(**vars(args) | {"mixed_precision": False})
        models = Models(copy.deepcopy(models.policy).float(), copy.deepcopy(models.reference).float())
        if args.batch_size % (2 * args.n_microbatches) == 0:  # float32 activations need smaller microbatches
            args.n_microbatches *= 2
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = None
    for case in [Case("original"), *cases]:
        print(f"first gradient: {case.name}", file=sys.stderr, flush=True)
        models.restore()
        with StepRecorder(models.policy, keep_gradients=True) as recorder:
            case.run(models, recorder, [batch], args)
        expected = expected or recorder.gradients
        differences = [
            (recorder.gradients[name] - g).abs().max() / g.abs().max().clamp(min=1e-30) for name, g in expected.items()
        ]
        case.gradient_difference = max(differences).item()
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training


# ---- command line ---------------------------------------------------------------------------------------------------


def description(pairs: list[dict], models: Models, args: Namespace) -> str:
    """Describe the hardware, versions, model and data that the figures are for."""
    if models.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
        hardware = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    n_parameters = sum(parameter.numel() for parameter in models.policy.parameters())
    means = [f"{part} {statistics.mean(len(pair[f'{part}_input_ids']) for pair in pairs):.1f}"
             for part in ("prompt", "chosen", "rejected")]  # fmt: skip
    settings = " ".join(f"{key}={value}" for key, value in vars(args).items() if key != "ways")
    return (
        f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}; {n_parameters / 1e6:.1f} M "
        f"parameters, attention: {models.policy.config._attn_implementation}; mean tokens, responses with their "
        f"prompts: {', '.join(means)}; {settings}"
    )


def print_table(cases: list[Case], n_pairs: int):
    """Print the measurements as a Markdown table, with ratios to the first row."""
    print_header(["way", "pairs/s", "ms per pair", "computed tokens per pair", "peak memory, MiB",
                  f"pairs/s over {cases[0].name}", "largest gradient difference"])  # fmt: skip
    for case in cases:
        seconds = case.median_seconds
        print_row([case.name, f"{n_pairs / seconds:.3g}", f"{1000 * seconds / n_pairs:.3g}",
                   f"{case.n_positions / n_pairs:.0f}", f"{case.peak_memory / 2**20:.0f}",
                   f"{cases[0].median_seconds / seconds:.2f}", f"{case.gradient_difference:.1e}"])  # fmt: skip


def parse_args(words: list[str] | None = None) -> Namespace:
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
    parser.add_argument("--max-length", type=int, default=512, help="most tokens in prompt and response")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="most tokens in the prompt of a long pair")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--n-microbatches", type=int, default=1, help="smallest number of microbatches in a batch")
    parser.add_argument("--max-tokens", type=int, help="most tokens in a microbatch (not for the original and TRL)")
    parser.add_argument("--activation-checkpointing", action="store_true", help="for every way")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per way and round")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them, on the first batch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which the ways take turns")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; by default as many as PyTorch chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**PRESETS.get(parser.parse_known_args(words)[0].preset, {}))
    args = parser.parse_args(words)
    if args.batch_size % args.n_microbatches:
        parser.error(f"--n-microbatches {args.n_microbatches} does not divide the batch size")
    return args


def main():
    args = parse_args()
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed, so it isn't measured: pip install trl==1.16.0\n")
        args.ways = [way for way in args.ways if not way.startswith("trl")]
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    torch.set_num_threads(args.threads or torch.get_num_threads())
    n_pairs = args.steps * args.batch_size
    pairs = random_pairs(n_pairs, args.vocab, args.max_length, args.max_prompt_length, args.seed)
    batches = [collate(pairs[start : start + args.batch_size]) for start in range(0, n_pairs, args.batch_size)]
    models = build_models(args)
    print(description(pairs, models, args), end="\n\n", flush=True)
    cases = [Case(way) for way in args.ways]
    compare_gradients(cases, models, batches[0], args)
    measure(cases, models, batches, args)
    print_table(cases, n_pairs)


if __name__ == "__main__":
    main()
