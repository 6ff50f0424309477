"""How a batch is cut into microbatches: parts that are computed one after the other, their gradients added up."""

from collections.abc import Callable

import torch

from utils import take

CPU_OVERHEAD = 64  # what one more microbatch costs on a CPU, in tokens


def part_lengths(batch: dict) -> list[torch.Tensor]:
    """Tokens in each example's prompt and in its response or responses, each of shape (batch_size,)."""
    sides = [side for side in ("chosen", "rejected") if f"{side}_labels" in batch]
    prompts = batch["chosen_attention_mask"].sum(1) - (batch["chosen_labels"] != -100).sum(1)
    return [prompts, *((batch[f"{side}_labels"] != -100).sum(1) for side in sides)]


def computed_tokens(batch: dict, shared: bool, padded: bool = False) -> torch.Tensor:
    """Tokens that are computed for each example, (batch_size,).

    Args:
        shared: a pair's prompt is computed once.
        padded: with the padding of the shorter of an example's two rows.
    """
    if shared:
        return sum(part_lengths(batch))
    # whole sequences, as the two of unpaired data have prompts of their own
    n_tokens = [batch[key].sum(1) for key in ("chosen_attention_mask", "rejected_attention_mask") if key in batch]
    return len(n_tokens) * torch.stack(n_tokens).amax(0) if padded else sum(n_tokens)


def microbatches(
    batch: dict,
    n_least: int,
    shared: bool,
    overhead: float = CPU_OVERHEAD,
    packed: bool = False,
    max_tokens: int | None = None,
    agree: Callable[[int], int] = lambda n: n,
) -> list[dict]:
    """Cut a batch into microbatches, at least `n_least`, none with more than its `n_least`-th part of the examples.

    The examples are sorted by length first and cut where padding and the cost of one more microbatch come to least, so
    a microbatch pads little. Together they hold each example once; weigh each by its number of examples.

    Args:
        shared: a pair's prompt is computed once.
        overhead: what one more microbatch costs, in tokens.
        packed: there is no padding.
        max_tokens: in a microbatch, padding among them; an example that has more is one by itself.
        agree: where several workers must make equally many, tells each the most that any of them makes.
    """
    lengths = computed_tokens(batch, shared, padded=not packed)
    order = lengths.argsort(descending=True, stable=True)
    sizes = _cheapest_cuts(lengths[order].tolist(), len(order) // n_least, overhead, packed, max_tokens)
    for _ in range(agree(len(sizes)) - len(sizes)):
        largest = sizes.index(max(sizes))
        sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
    return [take(batch, indices) for indices in order.split(sizes)]


def _cheapest_cuts(
    lengths: list[int], max_size: int, overhead: float, packed: bool = False, max_tokens: int | None = None
) -> list[int]:
    """Sizes of the consecutive groups, at most `max_size` each, that cost least in all; `lengths` fall.

    A group costs its examples times its longest, or if packed the sum of their lengths, plus `overhead`.
    """
    best = [0.0] + [float("inf")] * len(lengths)  # cost of the first n examples
    last = [0] * (len(lengths) + 1)  # size of their last group
    for end in range(1, len(lengths) + 1):
        n_tokens = 0
        for size in range(1, min(max_size, end) + 1):
            longest = lengths[end - size]
            n_tokens = n_tokens + longest if packed else size * longest
            if max_tokens is not None and n_tokens > max_tokens and size > 1:
                break
            cost = best[end - size] + n_tokens + overhead
            if cost < best[end]:
                best[end], last[end] = cost, size
    sizes, end = [], len(lengths)
    while end > 0:
        sizes.append(last[end])
        end -= last[end]
    return sizes[::-1]
