"""Select examples: drop those that are too long or have identical responses; apply `n_examples` and weights."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np

from data import report
from data.batches import Prompt, example_counts, split_name
from data.choice import Choice
from data.prepared import PreparedPrompts
from utils import UserError, rank0_print

_SHOWN = 10  # examples listed in an error message


def drop_overlong(
    part: Sequence[Prompt], choice: Choice, split: str, sft_mode: bool, tokenizer, max_length: int, add_bos: bool
) -> Sequence[Prompt]:
    """Drop a dataset's examples that are longer than `max_length`; with `truncation=error`, raise UserError instead.

    Raises: UserError also if no example is left.
    """
    prompts, responses, prompt_of_example = report.example_lengths(part, sft_mode, tokenizer, add_bos)
    too_long = prompts + responses > max_length
    if not too_long.any():
        return part
    if choice.truncation == "error":
        places = "\n".join(f"  {part[int(n)].place(0)}" for n in prompt_of_example[too_long][:_SHOWN])
        raise UserError(
            f"truncation=error: {too_long.sum()} examples are longer than max_length={max_length} tokens:\n"
            f"{places}\nShorten them, raise max_length, or choose truncation=drop, keep_end or keep_start"
        )
    if too_long.all():
        raise UserError(
            f"{split_name(choice.name, split)}: truncation=drop leaves nothing; raise max_length={max_length}"
        )
    rank0_print(f"{choice.name} ({split}): dropped {too_long.sum()} examples longer than max_length")
    return _without(part, prompt_of_example, too_long, sft_mode)


def _without(
    part: Sequence[Prompt], prompt_of_example: np.ndarray, unwanted: np.ndarray, sft_mode: bool
) -> Sequence[Prompt]:
    """Return the prompts without the unwanted examples; `PreparedPrompts` are changed in place.

    Args:
        prompt_of_example: the index of each example's prompt, (n_examples,), in ascending order.
        unwanted: a mask, (n_examples,).
    """
    if isinstance(part, PreparedPrompts):
        part.drop(unwanted, sft_mode)
        return part
    counts, kept = np.bincount(prompt_of_example, minlength=len(part)), []
    for prompt, is_kept in zip(part, np.split(~unwanted, counts.cumsum()[:-1]), strict=True):
        if is_kept.any():
            pairs = (
                {} if sft_mode else {key: list(compress(getattr(prompt, key), is_kept)) for key in ("pairs", "rows")}
            )
            kept.append(replace(prompt, **pairs))
    return kept


def drop_identical(
    part: PreparedPrompts,
    choice: Choice,
    split: str,
    skips_bad: bool,
    max_length: int,
    max_prompt_length: int,
    add_bos: bool,
):
    """Drop pairs whose responses are the same tokens after truncation: there is nothing to learn from them.

    Raises: UserError if there are any and `skips_bad` is False, or if no pair is left.
    """
    identical = part.are_identical_when_truncated(max_length, max_prompt_length, add_bos)
    if not identical.any():
        return
    n, where = int(identical.sum()), split_name(choice.name, split)
    if not skips_bad:
        prompt_of_example = part.lengths(sft_mode=False, add_bos=add_bos)[2]
        places = "\n".join(f"  {part[int(number)].place(0)}" for number in prompt_of_example[identical][:_SHOWN])
        counted = f"all {n:,}" if n == len(identical) else f"{n:,} of {len(identical):,}"
        raise UserError(
            f"{where}: once they are cut to max_length={max_length}, chosen and rejected are identical in {counted} "
            f"pairs:\n{places}\nRaise max_length or lower max_prompt_length, or drop such pairs with "
            "on_bad_example=skip or truncation=drop"
        )
    rank0_print(f"{choice.name} ({split}): dropped {n:,} pairs that are identical once cut to max_length")
    part.drop(identical, sft_mode=False)
    if not part.n_pairs.any():
        raise UserError(f"{where}: no pair is left; raise max_length={max_length}")


def draw_examples(part: Sequence[Prompt], choice: Choice, sft_mode: bool, seed: int) -> Sequence[Prompt]:
    """Draw `n_examples` of a dataset at random, by the seed.

    Prompts are drawn with all their pairs, except that the last one may keep only its first pairs.
    """
    counts = np.ones(len(part), dtype=np.int64) if sft_mode else example_counts(part)
    if choice.n_examples > counts.sum():
        rank0_print(f"{choice.name}: n_examples={choice.n_examples}, but there are only {counts.sum()}")
    n_kept, n_left = np.zeros_like(counts), choice.n_examples  # examples of each prompt; examples still to be drawn
    for index in np.random.RandomState(seed).permutation(len(part)):
        n_kept[index] = min(counts[index], n_left)
        n_left -= n_kept[index]
    prompt_of_example = np.repeat(np.arange(len(part)), counts)
    unwanted = np.concatenate([np.arange(count) >= kept for count, kept in zip(counts, n_kept, strict=True)])
    return _without(part, prompt_of_example, unwanted, sft_mode)


def epoch_order(parts: list[Sequence[Prompt]], choices: list[Choice], sft_mode: bool, seed: int) -> np.ndarray:
    """Return the indices of an epoch's prompts in the concatenation of all datasets.

    Each dataset is repeated by its weight. If it has `n_examples`, prompts without examples are left out.
    """
    order, start = [], 0
    for part, choice in zip(parts, choices, strict=True):
        has_all = sft_mode or choice.n_examples is None
        indices = np.arange(len(part)) if has_all else np.flatnonzero(example_counts(part))
        n_repeats, fraction = divmod(choice.weight, 1)
        partial = np.sort(np.random.RandomState(seed + 1).permutation(indices)[: round(fraction * len(indices))])
        order += [start + indices] * int(n_repeats) + [start + partial]
        start += len(part)
    return np.concatenate(order)
