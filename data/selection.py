"""Select the examples of a dataset by length, by difference of their responses, by `n_examples` and by weight."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from data import report
from data.batches import Prompt, example_counts, split_name
from data.choice import Choice
from data.prepared import PreparedPrompts
from utils import UserError, rank0_print

_SHOWN = 10  # examples listed in an error message


def without_overlong(
    part: Sequence[Prompt], choice: Choice, split: str, sft_mode: bool, tokenizer, **lengths: int
) -> Sequence[Prompt]:
    """Drop the examples longer than `max_length` of a dataset with `truncation=drop`.

    Raises: UserError if nothing is left, or if there are any and the dataset has `truncation=error`.
    """
    prompts, responses, numbers = report.example_lengths(part, sft_mode, tokenizer)
    too_long = prompts + responses + int(lengths["add_bos"]) > lengths["max_length"]
    if not too_long.any():
        return part
    if choice.truncation == "error":
        places = "\n".join(f"  {part[int(n)].place(0)}" for n in numbers[too_long][:_SHOWN])
        raise UserError(
            f"truncation=error: {too_long.sum()} examples are longer than max_length={lengths['max_length']} tokens:\n"
            f"{places}\nShorten them, raise max_length, or choose truncation=drop, keep_end or keep_start"
        )
    if too_long.all():
        raise UserError(
            f"{split_name(choice.name, split)}: truncation=drop leaves nothing; raise "
            f"max_length={lengths['max_length']}"
        )
    rank0_print(f"{choice.name} ({split}): dropped {too_long.sum()} examples longer than max_length")
    return _without(part, numbers, too_long, sft_mode)


def _without(part: Sequence[Prompt], numbers: np.ndarray, unwanted: np.ndarray, sft_mode: bool) -> Sequence[Prompt]:
    """Return the prompts without the unwanted examples; `numbers` holds the prompt's number of each example."""
    if isinstance(part, PreparedPrompts):
        part.drop(unwanted, sft_mode)
        return part
    dropped = set(_masked_examples(numbers, unwanted))
    kept = []
    for number, prompt in enumerate(part):
        indices = [index for index in range(len(prompt.pairs)) if sft_mode or (number, index) not in dropped]
        if (number, 0) not in dropped if sft_mode else indices:
            rows = [prompt.rows[index] for index in indices] if prompt.rows else []
            kept.append(replace(prompt, pairs=[prompt.pairs[index] for index in indices], rows=rows))
    return kept


def drop_identical(part: PreparedPrompts, choice: Choice, split: str, skips_bad: bool, **lengths: int):
    """Drop pairs whose responses are the same tokens after truncation: there is nothing to learn from them.

    Raises: UserError if there are any and `skips_bad` is False, or if no pair is left.
    """
    identical = part.are_identical_when_truncated(**lengths)
    if not identical.any():
        return
    n, where = int(identical.sum()), split_name(choice.name, split)
    if not skips_bad:
        numbers = part.lengths(sft_mode=False)[2][identical]
        places = "\n".join(f"  {part[int(number)].place(0)}" for number in numbers[:_SHOWN])
        counted = f"all {n:,}" if n == len(identical) else f"{n:,} of {len(identical):,}"
        raise UserError(
            f"{where}: once they are cut to max_length={lengths['max_length']}, chosen and rejected are identical in "
            f"{counted} pairs:\n{places}\nRaise max_length or lower max_prompt_length, or drop such pairs with "
            "on_bad_example=skip or truncation=drop"
        )
    rank0_print(f"{choice.name} ({split}): dropped {n:,} pairs that are identical once cut to max_length")
    part.drop(identical, sft_mode=False)
    if not part.n_pairs.any():
        raise UserError(f"{where}: no pair is left; raise max_length={lengths['max_length']}")


def _masked_examples(numbers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the prompt's number, and the index within the prompt, of each example that the mask selects."""
    next_index: dict[int, int] = defaultdict(int)
    for number, is_selected in zip(numbers.tolist(), mask.tolist(), strict=True):
        if is_selected:
            yield number, next_index[number]
        next_index[number] += 1


def draw_examples(part: Sequence[Prompt], choice: Choice, sft_mode: bool, seed: int) -> Sequence[Prompt]:
    """Select `n_examples` of a dataset.

    Prompts are drawn by the seed, with all their pairs; the last one drawn may keep only its first pairs.
    """
    counts = np.ones(len(part), dtype=np.int64) if sft_mode else example_counts(part)
    if choice.n_examples > counts.sum():
        rank0_print(f"{choice.name}: n_examples={choice.n_examples}, but there are only {counts.sum()}")
    n_kept, n_left = np.zeros_like(counts), choice.n_examples  # examples of each prompt
    for number in np.random.RandomState(seed).permutation(len(part)):
        n_kept[number] = min(counts[number], n_left)
        n_left -= n_kept[number]
    numbers = np.repeat(np.arange(len(part)), counts)  # the prompt's number of each example
    unwanted = np.concatenate([np.arange(count) >= kept for count, kept in zip(counts, n_kept, strict=True)])
    return _without(part, numbers, unwanted, sft_mode)


def epoch_order(parts: list[Sequence[Prompt]], choices: list[Choice], sft_mode: bool, seed: int) -> np.ndarray:
    """Return the prompts of an epoch according to the datasets' weights, numbered through all datasets.

    If a dataset has `n_examples`, prompts without examples are left out.
    """
    order, start = [], 0
    for part, choice in zip(parts, choices, strict=True):
        has_all = sft_mode or choice.n_examples is None
        numbers = np.arange(len(part)) if has_all else np.flatnonzero(example_counts(part))
        n_repeats, fraction = divmod(choice.weight, 1)
        partial = np.sort(np.random.RandomState(seed + 1).permutation(numbers)[: round(fraction * len(numbers))])
        order += [start + numbers] * int(n_repeats) + [start + partial]
        start += len(part)
    return np.concatenate(order)
