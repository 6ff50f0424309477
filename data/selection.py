"""Which of a dataset's prompts are used: without over-long ones, by weight and number."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from data import report
from data.batches import Prompt, example_counts, split_name
from data.choice import Choice
from data.prepared import PreparedPrompts
from utils import UserError, rank0_print

_SHOWN = 10  # places in a message


def without_overlong(
    part: Sequence[Prompt], choice: Choice, sft_mode: bool, tokenizer, split: str, **lengths: int
) -> Sequence[Prompt]:
    """With `truncation=drop`, the prompts without examples longer than `max_length`; with `error` there may be none."""
    if choice.truncation not in ("drop", "error"):
        return part
    prompts, responses, numbers = report.lengths(part, sft_mode, tokenizer)
    too_long = prompts + responses + int(lengths["add_bos"]) > lengths["max_length"]
    if too_long.any() and choice.truncation == "error":
        places = "\n".join(f"  {part[int(n)].place(0)}" for n in numbers[too_long][:_SHOWN])
        raise UserError(
            f"truncation=error: {too_long.sum()} examples are longer than max_length={lengths['max_length']} tokens:\n"
            f"{places}\nShorten them, raise max_length, or choose truncation=drop, keep_end or keep_start"
        )
    rank0_print(f"{choice.name} ({split}): {too_long.sum()} examples longer than max_length are dropped")
    if too_long.any() and too_long.all():
        raise UserError(
            f"{split_name(choice.name, split)}: truncation=drop leaves nothing; raise "
            f"max_length={lengths['max_length']}"
        )
    return _without(part, numbers, too_long, sft_mode)


def _without(part: Sequence[Prompt], numbers: np.ndarray, unwanted: np.ndarray, sft_mode: bool) -> Sequence[Prompt]:
    """Return the prompts without the unwanted examples: a mask, `numbers` being the prompt of each."""
    if isinstance(part, PreparedPrompts):
        part.leave_out(unwanted, sft_mode)
        return part
    dropped = set(_counted(numbers, unwanted))
    kept = []
    for number, prompt in enumerate(part):
        indices = [index for index in range(len(prompt.pairs)) if sft_mode or (number, index) not in dropped]
        if (number, 0) not in dropped if sft_mode else indices:
            rows = [prompt.rows[index] for index in indices] if prompt.rows else []
            kept.append(replace(prompt, pairs=[prompt.pairs[index] for index in indices], rows=rows))
    return kept


def without_identical(part: Sequence[Prompt], choice: Choice, split: str, skips_bad: bool, **lengths: int):
    """Leave out pairs whose responses are the same tokens once they are cut to length: they say nothing.

    Named datasets keep them, as in the original. Raises: UserError if there are any, unless `skips_bad`.
    """
    if not isinstance(part, PreparedPrompts):
        return
    identical = part.are_identical_when_cut(**lengths)
    if not identical.any():
        return
    n, where = int(identical.sum()), split_name(choice.name, split)
    if not skips_bad:
        numbers = part.lengths(sft_mode=False)[2][identical]
        places = "\n".join(f"  {part[int(number)].place(0)}" for number in numbers[:_SHOWN])
        counted = f"all {n:,}" if n == len(identical) else f"{n:,} of {len(identical):,}"
        raise UserError(
            f"{where}: once they are cut to max_length={lengths['max_length']}, chosen and rejected are identical in "
            f"{counted} pairs:\n{places}\nRaise max_length or lower max_prompt_length, or leave such pairs out by "
            "on_bad_example=skip or truncation=drop"
        )
    rank0_print(f"{choice.name} ({split}): {n:,} pairs are left out, identical once cut to max_length")
    part.leave_out(identical, sft_mode=False)
    if not part.n_pairs.any():
        raise UserError(f"{where}: no pair is left; raise max_length={lengths['max_length']}")


def _counted(numbers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """The number of the prompt and the index within it of each masked example."""
    seen: dict[int, int] = defaultdict(int)
    for number, is_wanted in zip(numbers.tolist(), mask.tolist(), strict=True):
        if is_wanted:
            yield number, seen[number]
        seen[number] += 1


def first_examples(part: Sequence[Prompt], choice: Choice, seed: int, sft_mode: bool) -> Sequence[Prompt]:
    """Return as many examples as `n_examples` of a dataset says, of prompts that are drawn by the seed; of the last
    prompt perhaps only its first pairs."""
    if choice.n_examples is None:
        return part
    counts = np.ones(len(part), dtype=np.int64) if sft_mode else example_counts(part)
    if choice.n_examples > counts.sum():
        rank0_print(f"{choice.name}: n_examples={choice.n_examples}, but there are only {counts.sum()}")
    drawn = np.random.RandomState(seed).permutation(len(part))
    before = np.zeros(len(part), dtype=np.int64)  # examples of the prompts that are drawn before each
    before[drawn] = counts[drawn].cumsum() - counts[drawn]
    n_kept = np.clip(choice.n_examples - before, 0, counts)
    numbers = np.repeat(np.arange(len(part)), counts)  # of the prompt of each example
    index = np.arange(len(numbers)) - np.repeat(counts.cumsum() - counts, counts)  # within its prompt
    return _without(part, numbers, index >= n_kept[numbers], sft_mode)


def epoch_order(parts: list[Sequence[Prompt]], choices: list[Choice], seed: int, sft_mode: bool) -> np.ndarray | None:
    """Return which prompts an epoch takes, counted through all datasets, as weights say; None: each once.

    Of a dataset with `n_examples`, prompts that have no example aren't shuffled with the others.
    """
    if all(choice.weight == 1 and choice.n_examples is None for choice in choices):
        return None
    order, start = [], 0
    for part, choice in zip(parts, choices, strict=True):
        has_all = sft_mode or choice.n_examples is None
        numbers = np.arange(len(part)) if has_all else np.flatnonzero(example_counts(part))
        whole, rest = divmod(choice.weight, 1)
        part_of_it = np.sort(np.random.RandomState(seed + 1).permutation(numbers)[: round(rest * len(numbers))])
        order += [start + numbers] * int(whole) + [start + part_of_it]
        start += len(part)
    return np.concatenate(order)
