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


def without_overlong(
    part: Sequence[Prompt], choice: Choice, sft_mode: bool, tokenizer, split: str, **lengths: int
) -> Sequence[Prompt]:
    """With `truncation=drop`, the prompts without examples longer than `max_length`; with `error` there may be none."""
    if choice.truncation not in ("drop", "error"):
        return part
    prompts, responses, numbers = report.lengths(part, sft_mode, tokenizer)
    too_long = prompts + responses + int(lengths["add_bos"]) > lengths["max_length"]
    if too_long.any() and choice.truncation == "error":
        places = "\n".join(f"  {part[int(n)].place(0)}" for n in numbers[too_long][:10])
        raise UserError(
            f"truncation=error: {too_long.sum()} examples are longer than max_length={lengths['max_length']} tokens:\n"
            f"{places}\nShorten them, raise max_length, or choose truncation=drop, keep_end or keep_start"
        )
    rank0_print(f"{choice.name} ({split}): {too_long.sum()} examples longer than max_length are dropped")
    if isinstance(part, PreparedPrompts):
        part.leave_out(too_long, sft_mode)
        return part
    dropped = set(_counted(numbers, too_long))
    kept = []
    for number, prompt in enumerate(part):
        indices = [index for index in range(len(prompt.pairs)) if sft_mode or (number, index) not in dropped]
        if (number, 0) not in dropped if sft_mode else indices:
            rows = [prompt.rows[index] for index in indices] if prompt.rows else []
            kept.append(replace(prompt, pairs=[prompt.pairs[index] for index in indices], rows=rows))
    if not kept:
        raise UserError(
            f"{split_name(choice.name, split)}: truncation=drop leaves nothing; raise "
            f"max_length={lengths['max_length']}"
        )
    return kept


def _counted(numbers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """The number of the prompt and the index within it of each masked example."""
    seen: dict[int, int] = defaultdict(int)
    for number, is_wanted in zip(numbers.tolist(), mask.tolist(), strict=True):
        if is_wanted:
            yield number, seen[number]
        seen[number] += 1


def epoch_order(parts: list[Sequence[Prompt]], choices: list[Choice], seed: int, sft_mode: bool) -> np.ndarray | None:
    """Which prompts an epoch takes, counted through all datasets, as weights and numbers of examples say."""
    if all(choice.weight == 1 and choice.n_examples is None for choice in choices):
        return None
    order, start = [], 0
    for part, choice in zip(parts, choices, strict=True):
        numbers, counts = np.arange(len(part)), np.ones(len(part), dtype=int) if sft_mode else example_counts(part)
        drawn = np.random.RandomState(seed).permutation(len(part))
        if choice.n_examples is not None:
            if choice.n_examples > counts.sum():
                rank0_print(f"{choice.name}: n_examples={choice.n_examples}, but there are only {counts.sum()}")
            needed = int(np.searchsorted(counts[drawn].cumsum(), choice.n_examples)) + 1
            numbers = np.sort(drawn[:needed])
        whole, rest = divmod(choice.weight, 1)
        part_of_it = np.sort(np.random.RandomState(seed + 1).permutation(numbers)[: round(rest * len(numbers))])
        order += [start + numbers] * int(whole) + [start + part_of_it]
        start += len(part)
    return np.concatenate(order)
