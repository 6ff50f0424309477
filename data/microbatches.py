"""Cut a batch into microbatches, which are computed one after the other, with their gradients summed."""

from collections.abc import Callable

import torch

from utils import select_examples

CPU_OVERHEAD = 64  # cost of one more microbatch on a CPU, in tokens


def part_lengths(batch: dict) -> list[torch.Tensor]:
    """Return the number of tokens in each example's prompt, and in the rest of each sequence: (batch_size,) each.

    The prompt is the part that both sequences share before their first trained token. The rest may hold untrained
    tokens, too: turns of the user or of tools between the assistant's.
    """
    sides = [side for side in ("chosen", "rejected") if f"{side}_labels" in batch]
    n_tokens = [batch[f"{side}_attention_mask"].sum(1) for side in sides]
    starts = [_first(batch[f"{side}_labels"] != -100) for side in sides]
    if len(sides) == 2:
        chosen_ids, rejected_ids = (batch[f"{side}_input_ids"] for side in sides)
        width = min(chosen_ids.shape[1], rejected_ids.shape[1])
        starts.append(_first(chosen_ids[:, :width] != rejected_ids[:, :width]))
    n_prompt = torch.stack([*n_tokens, *starts]).amin(0)
    return [n_prompt, *(n - n_prompt for n in n_tokens)]


def _first(is_wanted: torch.Tensor) -> torch.Tensor:
    """Return the first wanted position of each row, or T if there is none: (B, T) to (B,)."""
    positions = torch.arange(is_wanted.shape[1]).expand_as(is_wanted)
    return positions.masked_fill(~is_wanted, is_wanted.shape[1]).amin(1)


def computed_tokens(batch: dict, shared: bool, padded: bool = False) -> torch.Tensor:
    """Return the number of tokens that are computed for each example, (batch_size,).

    Args:
        shared: a pair's prompt is computed once.
        padded: count the padding of the shorter of an example's two rows.
    """
    if shared:
        return sum(part_lengths(batch))
    # count whole sequences: in unpaired data, the chosen and the rejected one have different prompts
    n_tokens = [batch[key].sum(1) for key in ("chosen_attention_mask", "rejected_attention_mask") if key in batch]
    return len(n_tokens) * torch.stack(n_tokens).amax(0) if padded else sum(n_tokens)


def microbatches(
    batch: dict,
    min_microbatches: int,
    shared: bool,
    overhead: float = CPU_OVERHEAD,
    packed: bool = False,
    max_tokens: int | None = None,
    agree: Callable[[int], int] = lambda n: n,
) -> list[dict]:
    """Cut a batch into at least n = `min_microbatches` microbatches, each of at most 1 / n of the examples.

    Examples are sorted by length, then cut where the cost of padding and of additional microbatches is lowest. Each
    example is in one microbatch; weigh a microbatch by its number of examples.

    Args:
        shared: a pair's prompt is computed once.
        overhead: cost of one more microbatch, in tokens.
        packed: there is no padding.
        max_tokens: the maximum number of tokens in a microbatch, with padding; a longer example gets one of its own.
        agree: returns the maximum of a number over all workers, if all must make the same number of microbatches.
    """
    lengths = computed_tokens(batch, shared, padded=not packed)
    order = lengths.argsort(descending=True, stable=True)
    sizes = _cheapest_cuts(lengths[order].tolist(), len(order) // min_microbatches, overhead, packed, max_tokens)
    for _ in range(agree(len(sizes)) - len(sizes)):
        largest = sizes.index(max(sizes))
        sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
    return [select_examples(batch, indices) for indices in order.split(sizes)]


def _cheapest_cuts(
    lengths: list[int], max_size: int, overhead: float, packed: bool, max_tokens: int | None
) -> list[int]:
    """Return the sizes of the cheapest consecutive groups of at most `max_size` examples.

    A group costs its size times its longest length or, if packed, the sum of its lengths, plus `overhead`.

    Args:
        lengths: the length of each example, in descending order.
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
