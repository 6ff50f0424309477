"""Figures of a run's size and speed: parameters, tokens and operations per second, memory."""

import re
import sys

import torch
from torch import nn

from utils import n_weights

# Dense bfloat16 (V100: float16) operations per second, by words in the GPU's name (NVIDIA's data sheets)
_PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "A6000": 155e12, "A40": 150e12,
    "A10": 125e12, "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
_OTHER_MODELS = {"ti", "d", "laptop", "super", "max", "mobile"}  # words that mark a different GPU


def peak_flops(gpu: str) -> float | None:
    """Return a GPU's advertised operations per second; None if unknown."""
    words = re.split(r"[\s-]+", gpu)
    if _OTHER_MODELS.intersection(word.lower() for word in words):
        return None
    known = (name for name in _PEAK_FLOPS if set(name.split()) <= set(words))
    longest = max(known, key=lambda name: len(name.split()), default=None)
    return _PEAK_FLOPS.get(longest)


def n_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained parameters and of all parameters, summed over the workers."""
    sizes = [(n_weights(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


class Throughput:
    """Computes the rates of a step from its time."""

    def __init__(self, policy: nn.Module, reference_model: nn.Module | None, n_workers: int):
        """
        Args:
            reference_model: the second model that every step computes; None if there is none.
        """
        self.n_trained, self.n_parameters = n_parameters(policy)
        n_reference = n_parameters(reference_model)[1] if reference_model is not None else 0
        # operations per parameter and token: 2 forward, 2 backward for the inputs, 2 for a trained parameter's gradient
        self.flops_per_token = 4 * self.n_parameters + 2 * self.n_trained + 2 * n_reference
        n_gpus = n_workers * len({parameter.device for parameter in policy.parameters() if parameter.is_cuda})
        peak = peak_flops(torch.cuda.get_device_name()) if n_gpus else None
        self.peak = peak * n_gpus if peak else None

    def metrics(self, n_examples: int, n_tokens: int, seconds: float) -> dict[str, float]:
        """Return a step's rates, over all workers.

        `model_flops_utilisation` is the share (0 to 1) of the GPU's advertised bfloat16 rate, as in
        https://arxiv.org/abs/2204.02311, not counting attention.
        """
        rates = {"examples_per_second": n_examples / seconds, "tokens_per_second": n_tokens / seconds}
        if self.peak:
            rates["model_flops_utilisation"] = n_tokens * self.flops_per_token / seconds / self.peak
        return rates


def peak_memory() -> str:
    """Return this process's peak memory in words."""
    parts = [f"{_peak_bytes() / 1e9:.1f} GB of host memory"]
    if torch.cuda.is_available():
        gpus = [torch.cuda.max_memory_allocated(gpu) / 1e9 for gpu in range(torch.cuda.device_count())]
        parts.append(f"{max(gpus):.1f} GB of GPU memory")
    return ", ".join(parts)


def _peak_bytes() -> int:
    """Return the host memory that this process has used at its peak."""
    try:
        import resource
    except ImportError:
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameters_in_words(n_trained: int, n_all: int) -> str:
    """Return text such as '1.2 M parameters, all of them trained'."""
    if n_trained == n_all:
        return f"{_abbreviated(n_all)} parameters, all of them trained"
    return f"{_abbreviated(n_all)} parameters, {_abbreviated(n_trained)} of them trained ({n_trained / n_all:.2%})"


def _abbreviated(number: int) -> str:
    """Return text such as '1.23 M'."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
