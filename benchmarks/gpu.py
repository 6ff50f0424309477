"""What a GPU does with each way to compute: `python benchmarks/gpu.py correctness|synchronization|profile|table`.

Needs torch and transformers alone. `correctness` holds the gradients of every way, in every precision, against padded
rows in float32 on the same GPU; `synchronization` counts how often a step makes the host wait; `profile` lists the
operations that a step spends its time in; `table` prints, from a folder of results, the one that the README takes.
benchmarks/gpu.sh runs them, and throughput.py, one part after the other. On
a CPU they run too, at toy size, to be tried out; but there is nothing to wait for.
"""

import argparse
import copy
import json
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import throughput

from acceleration.layout import Layout
from acceleration.model_check import choose_rows
from acceleration.packed_attention import supports_packed_attention, use_packed_attention
from acceleration.prefix_sharing import PACKED, packed_rows, packed_shared_rows, padded_rows, shared_rows
from acceleration.response_head import response_logps
from acceleration.shadow_weights import shadow_linear_weights
from losses import preference_loss

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ARCHITECTURES = ("gpt_neox", "llama", "llama, grouped queries", "qwen3", "gpt2")
PRECISIONS = {  # dtype of the weights, and what autocast computes in
    "float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "mixed": (torch.float32, torch.bfloat16),
}  # fmt: skip


def options(**changes) -> argparse.Namespace:
    """Those of throughput.py, at the size of the preset on a GPU."""
    sys.argv = ["throughput.py", *(["--preset", "pythia-2.8b"] if HAS_GPU else ["--vocab", "512", "--layers", "2"])]
    return argparse.Namespace(**{**vars(throughput.parse_args()), **changes})


def loss_of(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    return preference_loss(*logps.chunk(2), *reference_logps.chunk(2), beta=throughput.BETA)[0].mean()


def gradients(model: nn.Module, layout: Layout, batch: dict, reference_logps: torch.Tensor, autocast: torch.dtype):
    model.zero_grad()
    with torch.autocast(DEVICE.type, autocast) if autocast else nullcontext():
        logps = response_logps(model, layout.rows(batch))
    loss_of(logps, reference_logps).backward()
    return logps.detach(), [parameter.grad.double() for parameter in model.parameters()]


def correctness(results: list[dict]):
    """Log-probabilities and gradients of all ways against padded rows in float32, without TF32."""
    for name in ARCHITECTURES:
        args = options(arch=name.split(",")[0], layers=4, batch_size=16, mixed_precision=False, dtype="float32")
        training = throughput.build_models(args)
        model = training.policy
        if "grouped" in name:
            config = copy.deepcopy(model.config)
            config.num_key_value_heads = config.num_attention_heads // 4
            with DEVICE:
                model = transformers.AutoModelForCausalLM.from_config(config)
        batch = throughput.collate(throughput.random_pairs(args.batch_size, args))
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.no_grad():
            reference_logps = response_logps(model, padded_rows(batch))
        padded = Layout(padded_rows, whole_logits=False)
        expected_logps, expected = gradients(model, padded, batch, reference_logps, None)
        norm = torch.stack([gradient.norm() for gradient in expected]).norm()
        for precision, (dtype, autocast) in PRECISIONS.items():
            policy = copy.deepcopy(model).to(dtype)
            if autocast:
                shadow_linear_weights(policy)
            for make_rows in (padded_rows, shared_rows, packed_rows, packed_shared_rows):
                result = {"model": name, "precision": precision, "rows": make_rows.__name__}
                try:
                    if make_rows in PACKED and supports_packed_attention(policy):
                        use_packed_attention(policy)
                    found, ours = gradients(policy, Layout(make_rows, False), batch, reference_logps, autocast)
                    off = [(a - b).norm() for a, b in zip(ours, expected, strict=True)]
                    result["logps_differ_by_nats"] = float((found - expected_logps).abs().max())
                    result["gradient_differs_by"] = float(torch.stack(off).norm() / norm)
                except Exception as error:
                    result["fails_with"] = f"{type(error).__name__}: {error}"[:200]
                use_packed_attention(policy, False)
                say(results, result)
            autocasting = partial(torch.autocast, DEVICE.type, autocast) if autocast else nullcontext
            *_, why = choose_rows(policy, batch, "auto", args.max_length, padding_free="auto", autocast=autocasting)
            say(results, {"model": name, "precision": precision, "chosen": why})


def one_step(training: throughput.Training, args: argparse.Namespace) -> None:
    batches = [throughput.collate(throughput.random_pairs(args.batch_size, args))]
    throughput.WAYS["packed"][-1](training, batches, args)


def synchronization(results: list[dict]):
    """How often a step makes the host wait, as PyTorch sees it: once in training, for its metrics; here not at all."""
    if not HAS_GPU:
        say(results, {"waits": None, "of": "no GPU to wait for"})
        return
    args = options(layers=4)
    training = throughput.build_models(args)
    training.reset()
    one_step(training, args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one_step(training, args)
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message)[:200] for warning in caught if "synchroniz" in str(warning.message)]
    say(results, {"waits": len(waits), "of": sorted(set(waits))})


def profile(results: list[dict]):
    """The operations that a step spends its time in."""
    args = options()
    training = throughput.build_models(args)
    training.reset()
    for _ in range(2):
        one_step(training, args)
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if HAS_GPU else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        one_step(training, args)
    sort_by = "self_device_time_total" if HAS_GPU else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=30, max_name_column_width=70))


def readme_table(directory: Path) -> str:
    """Return throughput.json and memory.json of a folder of results as the README's table and the line below it."""
    measured = json.loads((directory / "throughput.json").read_text())
    original = next(row["pairs_per_second"] for row in measured["ways"] if row["way"] == "original")
    lines = ["| way | pairs/s | over the original | peak memory, GB |", "|---|---|---|---|"]
    for row in measured["ways"]:
        speed = row["pairs_per_second"]
        memory = row["peak_memory_bytes"] / 1e9
        lines.append(f"| {row['way']} | {speed:.3g} | {speed / original:.2f} | {memory:.1f} |")
    path = directory / "memory.json"
    plans = json.loads(path.read_text()) if path.exists() else []
    ratios = [plan["measured / predicted"] for plan in plans if "measured / predicted" in plan]
    if ratios:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} cases"
        lines.append(f"\nMemory, measured over predicted: {spread}.")
    failures = [f"{plan['model']}, {plan['way']}: {plan['fails_with']}" for plan in plans if "fails_with" in plan]
    return "\n".join([*lines, *failures, f"\n{measured['on']}"])


def say(results: list[dict], result: dict):
    print(json.dumps(result), flush=True)
    results.append(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = {"correctness": correctness, "synchronization": synchronization, "profile": profile}
    parser.add_argument("part", choices=[*parts, "table"])
    parser.add_argument("--json", help="a file that gets the results")
    parser.add_argument("--results", type=Path, help="the folder of results, for `table`")
    args = parser.parse_args()
    if args.part == "table":
        print(readme_table(args.results))
        return
    transformers.logging.set_verbosity_error()
    device = torch.cuda.get_device_name() if HAS_GPU else "no GPU"
    results = [{"on": f"{device}; torch {torch.__version__}, transformers {transformers.__version__}"}]
    print(results[0]["on"], flush=True)
    parts[args.part](results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
