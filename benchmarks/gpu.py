"""Checks and profiles of training on a GPU: `python benchmarks/gpu.py correctness|synchronization|profile`.

It needs only torch and transformers. benchmarks/gpu.sh runs its parts and the other benchmarks for a GPU.

- `correctness` compares log-probabilities and gradients of every layout, in every precision, with those of padded rows
  in float32 on the same GPU.
- `synchronization` counts how often the host waits for the GPU during a step.
- `profile` lists the operations that take most of a step's time.

On a CPU the parts run at toy size, to try them out; `synchronization` then has nothing to count.
"""

import argparse
import copy
import itertools
import json
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import throughput
import torch
import transformers
from common import collate, random_pairs
from torch import nn

from acceleration.layout import Layout
from acceleration.model_check import find_layout
from acceleration.packed_attention import packed_attention_used, supports_packed_attention
from acceleration.prefix_sharing import padded_rows
from acceleration.response_head import response_logps
from acceleration.shadow_weights import shadow_linear_weights
from log_probabilities import _get_batch_logps, concatenated_inputs
from losses import preference_loss

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ARCHITECTURES = ("gpt_neox", "llama", "llama, grouped queries", "qwen3", "gpt2")
PRECISIONS = {  # dtype of the weights, autocast's dtype
    "float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "mixed": (torch.float32, torch.bfloat16),
}  # fmt: skip


def throughput_options(**changes) -> argparse.Namespace:
    """Return the options of throughput.py, with a preset's sizes on a GPU and toy sizes on a CPU."""
    words = ["--preset", "pythia-2.8b"] if HAS_GPU else ["--vocab", "512", "--layers", "2"]
    return argparse.Namespace(**{**vars(throughput.parse_args(words)), **changes})


def plain_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the log-probability of each response as the original computes it: (2B,)."""
    inputs = {name: tensor.to(DEVICE) for name, tensor in concatenated_inputs(batch).items()}
    mask = inputs["concatenated_attention_mask"]
    logits = model(inputs["concatenated_input_ids"], attention_mask=mask, use_cache=False).logits
    return _get_batch_logps(logits.float(), inputs["concatenated_labels"])


def dpo_loss(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    return preference_loss(*logps.chunk(2), *reference_logps.chunk(2), beta=throughput.BETA)[0].mean()


def logps_and_gradients(
    model: nn.Module, layout: Layout, batch: dict, reference_logps: torch.Tensor, autocast: torch.dtype | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the log-probabilities of a batch's responses and the gradient of each parameter."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, autocast) if autocast else nullcontext():
        logps = response_logps(model, layout.rows(batch))
    dpo_loss(logps, reference_logps).backward()
    return logps.detach(), [parameter.grad.double() for parameter in model.parameters()]


def correctness():
    """Compare all layouts' log-probabilities and gradients with padded rows in float32, without TF32."""
    for name in ARCHITECTURES:
        args = throughput_options(
            arch=name.split(",")[0], layers=4, batch_size=16, mixed_precision=False, dtype="float32"
        )
        model = throughput.build_models(args).policy
        if "grouped" in name:
            config = copy.deepcopy(model.config)
            config.num_key_value_heads = config.num_attention_heads // 4
            with DEVICE:
                model = transformers.AutoModelForCausalLM.from_config(config)
        batch = collate(random_pairs(args.batch_size, args.vocab))
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.no_grad():
            reference_logps = response_logps(model, padded_rows(batch))
        expected_logps, expected = logps_and_gradients(model, Layout(), batch, reference_logps, None)
        norm = torch.stack([gradient.norm() for gradient in expected]).norm()
        for precision, (dtype, autocast) in PRECISIONS.items():
            policy = copy.deepcopy(model).to(dtype)
            if autocast:
                shadow_linear_weights(policy)
            for is_packed, shares_prompts in itertools.product((False, True), (False, True)):
                result = {"model": name, "precision": precision, "packed": is_packed, "shared": shares_prompts}
                is_prepared = is_packed and supports_packed_attention(policy)
                try:
                    with packed_attention_used(policy) if is_prepared else nullcontext():
                        found, ours = logps_and_gradients(
                            policy, Layout(shares_prompts, is_packed), batch, reference_logps, autocast
                        )
                    off = [(a - b).norm() for a, b in zip(ours, expected, strict=True)]
                    result["logps_differ_by_nats"] = float((found - expected_logps).abs().max())
                    result["gradient_differs_by"] = float(torch.stack(off).norm() / norm)
                except Exception as error:
                    result["fails_with"] = f"{type(error).__name__}: {error}"[:200]
                print(json.dumps(result), flush=True)
            autocasting = partial(torch.autocast, DEVICE.type, autocast) if autocast else nullcontext
            config = SimpleNamespace(shared_prompt="auto", padding_free="auto", max_length=args.max_length)
            _, message = find_layout(policy, plain_logps, batch, config, autocast=autocasting)
            print(json.dumps({"model": name, "precision": precision, "chosen": message}), flush=True)


def one_step(models: throughput.Models, args: argparse.Namespace):
    """Take one training step with packed rows on a batch of random pairs."""
    with throughput.StepRecorder(models.policy) as recorder:
        throughput.Case("packed").run(models, recorder, [collate(random_pairs(args.batch_size, args.vocab))], args)


def synchronization():
    """Count how often the host waits during a step, as PyTorch reports it.

    Training waits once per step, for the metrics. This step has none, so it should not wait at all.
    """
    if not HAS_GPU:
        print("there is no GPU to wait for")
        return
    args = throughput_options(layers=4)
    models = throughput.build_models(args)
    one_step(models, args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one_step(models, args)
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message)[:200] for warning in caught if "synchroniz" in str(warning.message)]
    print(json.dumps({"waits": len(waits), "of": sorted(set(waits))}))


def profile():
    """Print the operations that take most of a step's time."""
    args = throughput_options()
    models = throughput.build_models(args)
    for _ in range(2):
        one_step(models, args)
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if HAS_GPU else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        one_step(models, args)
    sort_by = "self_device_time_total" if HAS_GPU else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=30, max_name_column_width=70))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = {"correctness": correctness, "synchronization": synchronization, "profile": profile}
    parser.add_argument("part", choices=parts)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.cuda.get_device_name() if HAS_GPU else "no GPU"
    print(f"{device}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    parts[args.part]()


if __name__ == "__main__":
    main()
