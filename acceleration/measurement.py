"""Measure a computation of a model: its log-probabilities, one gradient, and how far rounding moves them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from log_probabilities import response_lengths
from utils import computed_dtype, select_examples, unwrap_adapter

SIDES = ("chosen", "rejected")
# A factor for log-probabilities that makes their gradients about as small as a loss's, so that they fit into float16.
_SCALE = 1 / 16
_TOKEN_WEIGHTS = torch.randn(997, generator=torch.Generator().manual_seed(0))  # token i has the weight at i % 997
# Error of a float32 sum, in units of its last digit. For 16-bit results, the final rounding outweighs it.
_SUM_ERROR = 32


# ---- examples -------------------------------------------------------------------------------------------------------


def synthetic_batch(batch: dict, lengths: list[tuple[int, int]]) -> dict:
    """Return examples with these numbers of tokens (prompt, whole sequence); both responses are equally long.

    Their tokens are drawn at random from those in `batch`, to avoid special tokens.
    """
    seen = batch["chosen_input_ids"][batch["chosen_attention_mask"].bool()]
    generator = torch.Generator().manual_seed(0)
    n_prompt, n_tokens = torch.tensor(lengths).T[..., None]  # (B, 1) each
    t = torch.arange(int(n_tokens.max()))  # (T,)
    chosen, rejected = seen[torch.randint(len(seen), (2, len(lengths), len(t)), generator=generator)]
    made = select_examples(batch, torch.arange(len(lengths)) % len(batch["prompt"]))
    for side, ids in zip(SIDES, (chosen, torch.where(t < n_prompt, chosen, rejected)), strict=True):
        if f"{side}_labels" in batch:
            made[f"{side}_input_ids"] = torch.where(t < n_tokens, ids, 0)
            made[f"{side}_attention_mask"] = (t < n_tokens).to(ids.dtype)
            made[f"{side}_labels"] = torch.where((n_prompt <= t) & (t < n_tokens), ids, -100)
    return made


def full_length_batch(batch: dict, max_length: int) -> dict:
    """Return a batch of one example whose sequences have `max_length` tokens each, a quarter of them the prompt."""
    return synthetic_batch(batch, [(max(1, max_length // 4), max_length)])


def each_alone(batch: dict) -> Iterator[dict]:
    """Yield each example of a synthetic batch by itself, without padding."""
    padded = [f"{side}_{kind}" for side in SIDES for kind in ("input_ids", "attention_mask", "labels")]
    for index in range(len(batch["prompt"])):
        example = select_examples(batch, torch.tensor([index]))
        n_tokens = int(example["chosen_attention_mask"].sum())
        yield example | {key: example[key][:, :n_tokens] for key in padded if key in example}


# ---- log-probabilities and a gradient -------------------------------------------------------------------------------


@dataclass
class Numbers:
    """Results for E examples: short ones, and one of full length unless it was left out."""

    logps: torch.Tensor  # (1 or 2, E) of chosen and rejected responses, in nats
    gradient: torch.Tensor  # (H,), a projection of the short examples' gradient
    leak: float  # the fraction of the gradient that reaches a row's last token: 0 if the model is causal


def measure(
    model: nn.Module,
    compute: Callable[[nn.Module, dict], torch.Tensor],
    short: dict,
    full_length: dict | None,
    autocast: Callable[[], contextlib.AbstractContextManager],
    alone: bool = False,
) -> Numbers:
    """Compute a batch of short examples, forward and backward, and the forward pass of a batch of full length.

    Args:
        compute: returns the log-probability of each response, chosen before rejected: (S,).
        alone: compute each short example separately.
    """
    parts = list(each_alone(short)) if alone else [short]
    logps, gradients, leaks = zip(
        *(_forward_and_backward(model, compute, part, autocast) for part in parts), strict=True
    )
    if full_length is not None:
        with torch.no_grad(), autocast():
            logps += (compute(model, full_length).view(-1, 1).cpu().double(),)
    return Numbers(torch.cat(logps, 1), sum(gradients), max(leaks))


def _forward_and_backward(
    model: nn.Module, compute: Callable, batch: dict, autocast: Callable
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return log-probabilities (sides, B), the projected gradient of chosen minus rejected ones (H,), and its leak.

    The gradient is taken with respect to the embedded tokens, so it passes through every layer's backward. It is
    weighted by token id and summed over tokens, because a token's place in a row depends on the layout.
    """
    with _embeddings_as_leaves(unwrap_adapter(model)) as embedded, torch.enable_grad(), autocast():
        logps = compute(model, batch)
    logps = logps.view(-1, len(batch["prompt"]))  # chosen, rejected
    if not embedded:
        raise RuntimeError("the model doesn't call the layer that get_input_embeddings() returns")
    ids, leaves = zip(*embedded, strict=True)
    objective = _SCALE * (logps[0].sum() - logps[1:].sum())
    gradients = [gradient.cpu().double() for gradient in torch.autograd.grad(objective, leaves, materialize_grads=True)]
    weights = [_TOKEN_WEIGHTS[tokens.cpu() % len(_TOKEN_WEIGHTS)].unsqueeze(-1) for tokens in ids]
    projection = sum((w * g).flatten(0, -2).sum(0) for w, g in zip(weights, gradients, strict=True))
    leak = max(float(gradient[:, -1].norm() / gradient.norm().clamp(min=1e-30)) for gradient in gradients)
    return logps.detach().cpu().double(), projection, leak


@contextlib.contextmanager
def _embeddings_as_leaves(model: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield a list that collects the token ids and embedded tokens of each forward; gradients end at the embeddings."""
    embedded = []

    def make_leaf(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        embedded.append((inputs[0], leaf))
        return leaf * 1  # not the leaf itself, because some models change embeddings in place

    hook = model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        yield embedded
    finally:
        hook.remove()


# ---- rounding -------------------------------------------------------------------------------------------------------


class Standard:
    """Numbers that others are compared with, and how far rounding moves them."""

    def __init__(self, numbers: Numbers, perturbed: Numbers, batches: list[dict]):
        """Compute how far rounding moves the standard.

        Args:
            numbers: the standard.
            perturbed: numbers of the short examples, computed inside `perturbed_by_rounding`.
            batches: all examples.
        """
        self.numbers = numbers
        sides = [
            [response_lengths(batch[f"{side}_labels"]) for batch in batches] for side in SIDES[: len(numbers.logps)]
        ]
        self.lengths = torch.stack([torch.cat(side) for side in sides]).clamp(min=1)  # (sides, E) in tokens
        size = float((numbers.logps / self.lengths.sqrt()).square().mean().sqrt())
        # two units in the last digit of float32: of a log-probability, of a gradient relative to its norm
        least_noise = 2 * torch.finfo(torch.float32).eps * size, 2 * torch.finfo(torch.float32).eps
        self.rounding = [max(pair) for pair in zip(self.distances(perturbed), least_noise, strict=True)]

    def distances(self, ours: Numbers) -> tuple[float, float]:
        """Return how far `ours` are from the standard; the example of full length may be missing.

        Returns: the root mean square of the differences of log-probabilities (nats), each divided by the square root of
            the response's number of tokens; and the relative difference of the gradient.
        """
        n = ours.logps.shape[1]
        logp_errors = (ours.logps - self.numbers.logps[:, :n]) / self.lengths[:, :n].sqrt()
        gradient_error = (ours.gradient - self.numbers.gradient).norm() / self.numbers.gradient.norm().clamp(min=1e-30)
        return float(logp_errors.square().mean().sqrt()), float(gradient_error)

    def difference(self, ours: Numbers, within: float, at_most: tuple[float, float]) -> str | None:
        """Describe how `ours` differ from the standard; None if their distances are within the limits.

        Args:
            within: limit on both distances, as a multiple of rounding noise.
            at_most: absolute limits on each.
        """
        distances = self.distances(ours)
        limits = [min(within * rounding, most) for rounding, most in zip(self.rounding, at_most, strict=True)]
        if not distances[0] <= limits[0]:  # also if it is NaN
            return f"log-probabilities change by up to {self.nats(ours):.3g} nats"
        if not distances[1] <= limits[1]:
            return f"the gradient changes by {100 * distances[1]:.2g} %"
        return None

    def nats(self, ours: Numbers) -> float:
        """Return the largest difference of a response's log-probability, in nats."""
        return float((ours.logps - self.numbers.logps[:, : ours.logps.shape[1]]).abs().max())


@contextlib.contextmanager
def perturbed_by_rounding(model: nn.Module) -> Iterator[None]:
    """Perturb the output of every layer except the head, and its gradient, by errors of the size of rounding.

    This is Monte Carlo arithmetic (D. S. Parker, UCLA CSD-970002, 1997) at the granularity of layers. The n-th output's
    noise is drawn with seed n, so that workers which compute the same output add the same noise.
    """
    counter = itertools.count()

    def perturb(module: nn.Module, inputs: tuple, output: object) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        generator = torch.Generator(output.device).manual_seed(next(counter))
        error = torch.empty(output.shape, device=output.device).uniform_(-1, 1, generator=generator)
        return (output * (1 + _rounding_error(output) * error)).to(output.dtype)

    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [layer.register_forward_hook(perturb) for layer in layers if layer is not model.get_output_embeddings()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounding_error(tensor: torch.Tensor) -> float:
    """Return the largest relative rounding error of results in a tensor's dtype."""
    dtype = computed_dtype(tensor)  # even if the output is wider, the next layer rounds it to this dtype
    if dtype not in (torch.float32, torch.float64):
        return torch.finfo(dtype).eps / 2
    if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32:  # TF32 has as many digits as float16
        return torch.finfo(torch.float16).eps / 2
    return _SUM_ERROR * torch.finfo(torch.float32).eps / 2  # also in float64: some models have parts in float32
