"""Print the data report before training: rows, lengths, truncation, and an example as the model sees it."""

from collections.abc import Sequence

import numpy as np
import torch

from basics.printing import counted, printable, uses_color
from data import chat
from data.batches import BatchIterator, Prompt, chosen_and_rejected
from data.prepared import PreparedPrompts
from utils import rank0_print

_MEASURED = 10_000  # prompts of a built-in dataset that are tokenized to estimate lengths
_SHOWN_TOKENS = 200  # tokens of the prompt, and of each response, that are printed
_QUANTILES = (0.1, 0.5, 0.9, 1.0)


def example_lengths(
    part: Sequence[Prompt], sft_mode: bool, tokenizer, add_bos: bool, step: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of tokens in each example's prompt and in its longer response, and the index of its prompt.

    All have shape (n_examples,). Responses are counted with their end token, prompts with the token added by `add_bos`.
    Only every `step`-th prompt of a built-in dataset is measured.
    """
    if isinstance(part, PreparedPrompts):
        return part.lengths(sft_mode, add_bos)
    texts, numbers = [], []
    for number in range(0, len(part), step):
        prompt = part[number]
        for index in range(1 if sft_mode else len(prompt.pairs)):
            texts += [prompt.text, *chosen_and_rejected(prompt, index, sft_mode)[0]]
            numbers.append(number)
    distinct = list(dict.fromkeys(texts))  # a prompt recurs with each of its pairs
    n_tokens = dict(zip(distinct, map(len, chat.token_ids(distinct, tokenizer)), strict=True))
    counts = np.array([n_tokens[text] for text in texts], dtype=np.int64).reshape(-1, 3)
    return counts[:, 0] + int(add_bos), counts[:, 1:].max(1, initial=0) + 1, np.array(numbers, dtype=np.int64)


def split_report(batches: BatchIterator, tokenizer, split: str) -> list[str]:
    """Return lines about a split: rows read and dropped, lengths, and truncation."""
    prepared = [part for part in batches.prompts.datasets if isinstance(part, PreparedPrompts)]
    lines = [line for part in prepared for line in _row_lines(part, split)]
    measured, note = [], ""
    for part in batches.prompts.datasets:
        step = 1 if isinstance(part, PreparedPrompts) else -(-len(part) // _MEASURED)
        note = note or (f", one prompt in {step}" if step > 1 else "")
        measured.append(example_lengths(part, batches.sft_mode, tokenizer, batches.lengths["add_bos"], step)[:2])
    prompts, responses = (np.concatenate(values) for values in zip(*measured, strict=True))
    quantiles = "/".join(f"{q:.0%}" for q in _QUANTILES[:-1])
    prompt_lengths, response_lengths = (
        "/".join(str(int(n)) for n in np.quantile(values, _QUANTILES, method="inverted_cdf"))
        for values in (prompts, responses)
    )
    lines.append(
        f"Tokens ({split}, {quantiles}/longest{note}): prompt {prompt_lengths}, longer response {response_lengths}; "
        f"{_truncation(prompts, responses, **batches.lengths)}"
    )
    return lines


def count_empty_prompts(batches: BatchIterator) -> int:
    """Return the number of prompts without tokens."""
    return sum(
        part.count_empty_prompts() if isinstance(part, PreparedPrompts) else sum(not prompt.text for prompt in part)
        for part in batches.prompts.datasets
    )


def _row_lines(part: PreparedPrompts, split: str) -> list[str]:
    """Return lines about a dataset: the rows that were read and dropped, and the columns that aren't used."""
    labels = [_label_line(part, split)] if part.undesirable_rows is not None else []
    rows = part.info.get(f"{split}_rows")
    if rows is None:
        share = f"{counted(len(part), 'prompt')} held out from the training data"
        return [f"{part.dataset} ({split}): {share}, the same in every run", *labels]
    bad = ", ".join(f"{count:,} {kind}" for kind, count in rows["bad"].items())
    dropped = f"; dropped: {bad}" if bad else ""
    without = int((part.n_pairs == 0).sum())
    no_pair = f"; {without:,} prompts without a preference" if without and part.n_pairs.any() else ""
    identical = rows["n_identical_pairs"]
    no_pair += f"; dropped {identical:,} pairs of identical responses" if identical else ""
    pairs = f" with {counted(int(part.n_pairs.sum()), 'pair')}" if part.n_pairs.any() else ""
    lines = [
        f"{part.dataset} ({split}): {part.info['format']}; {counted(rows['n_read'], 'row')} read, "
        f"{counted(len(part), 'prompt')}{pairs}{dropped}{no_pair}"
    ]
    if unread := part.info["unread"]:
        lines.append(f"{part.dataset} ({split}): not used: {', '.join(unread)}")
    if part.info["skips_template"] and split == "train":
        lines.append(
            f"{part.dataset}: prompts and responses are plain strings, to which the chat template isn't applied; "
            "apply_chat_template=true applies it"
        )
    if part.info["missing_openings"] and split == "train":
        endings = " or ".join(map(repr, part.info["missing_openings"][:3]))
        lines.append(
            f"{part.dataset}: the chat template's generation prompt ends in {endings}, which is missing from rendered "
            "dialogues, and so from the prompts that are trained on"
        )
    return lines + labels


def _label_line(part: PreparedPrompts, split: str) -> str:
    """Return a line with the number of responses by label, and how often the rarer ones are repeated."""
    (rarer, n_rarer), (_, n) = sorted(part.n_labelled.items(), key=lambda item: item[1])
    counts = ", ".join(f"{count:,} {label}" for label, count in part.n_labelled.items())
    repeated = f"; each {rarer} one is used {n / n_rarer:.3g} times per epoch" if n > n_rarer else ""
    return f"{part.dataset} ({split}): {counts} responses{repeated}"


def _truncation(prompts: np.ndarray, responses: np.ndarray, max_length: int, max_prompt_length: int, **_) -> str:
    """Return a phrase that says how many examples are truncated."""
    too_long = prompts + responses > max_length
    if not too_long.any():
        return f"no example is longer than max_length={max_length}"
    cut_prompts = too_long & (prompts > max_prompt_length)
    cut_responses = np.minimum(prompts, max_prompt_length) + responses > max_length
    return (
        f"{int(too_long.sum()):,} of {len(prompts):,} ({too_long.mean():.1%}) are longer than max_length={max_length}: "
        f"{int(cut_prompts.sum()):,} prompts are cut to max_prompt_length={max_prompt_length}, "
        f"{int((too_long & cut_responses).sum()):,} have responses cut"
    )


def format_example(batches: BatchIterator, tokenizer) -> str:
    """Decode the first example, with the trained tokens in colour on a terminal and otherwise in brackets."""
    batch = batches.first_examples(1)
    parts = []
    for side in ("chosen", "rejected"):
        if f"{side}_labels" not in batch:
            continue
        mask = batch[f"{side}_attention_mask"][0].bool()
        ids, labels = batch[f"{side}_input_ids"][0][mask], batch[f"{side}_labels"][0][mask]
        start = int((labels != -100).int().argmax())
        parts.append((side, ids[:start].tolist(), _runs(ids[start:], labels[start:])))
    opening, closing = ("\x1b[32m", "\x1b[0m") if uses_color() else "⟦⟧"
    shown = [f"An example with {len(parts[0][1])} prompt tokens, and its responses with the trained tokens marked:"]
    last_prompt = None
    for side, prompt, response in parts:
        if prompt != last_prompt:
            shown.append(_shortened(prompt, tokenizer))
        last_prompt = prompt
        texts = [(_shortened(run, tokenizer), is_trained) for run, is_trained in response]
        marked = [f"{opening}{text}{closing}" if is_trained else text for text, is_trained in texts]
        shown.append(f"  {side}: {''.join(marked)}")
    return "\n".join(shown)


def _runs(ids: torch.Tensor, labels: torch.Tensor) -> list[tuple[list[int], bool]]:
    """Divide a response's ids into runs of trained tokens (True) and of untrained ones (False)."""
    is_trained = labels != -100
    borders = (is_trained[1:] != is_trained[:-1]).nonzero().flatten() + 1
    parts = zip(ids.tensor_split(borders), is_trained.tensor_split(borders), strict=True)
    return [(part.tolist(), bool(trained[0])) for part, trained in parts]


def _shortened(ids: list[int], tokenizer) -> str:
    if len(ids) <= _SHOWN_TOKENS:
        return printable(tokenizer.decode(ids))
    half = _SHOWN_TOKENS // 2
    start, end = tokenizer.decode(ids[:half]), tokenizer.decode(ids[-half:])
    return printable(f"{start} [... {len(ids) - 2 * half} tokens ...] {end}")


def print_report(train: BatchIterator | None, test: BatchIterator, tokenizer):
    """Print the report of the training data, if any, and of the evaluation data."""
    opened = {"train": train, "test": test} if train is not None else {"test": test}
    for split, batches in opened.items():
        rank0_print("\n".join(split_report(batches, tokenizer, split)))
    print(format_example(test if train is None else train, tokenizer))
    if train is not None:
        if train.sft_mode and train.n_pairs.any():
            rank0_print(
                "loss=sft imitates the SFT targets (of your own data, the chosen responses); rejected responses are "
                "not used (loss=dpo trains on both)"
            )
        dropped = f"; dropped {counted(train.n_dropped, 'leftover example')}" if train.n_dropped else ""
        n_examples = counted(train.epoch_size, "example")
        rank0_print(
            f"Training data: {n_examples} per epoch in batches of {train.batch_size}{dropped}; "
            f"{counted(train.n_batches, 'step')} in total"
        )
    n_batches = counted(test.n_batches, "batch", "batches")
    rank0_print(f"Evaluation data: {counted(test.n_examples, 'example')}, each once, in {n_batches}")
    if not test.lengths["add_bos"] and (n_empty := sum(map(count_empty_prompts, opened.values()))):
        rank0_print(
            f"WARNING: {n_empty} prompts are empty: nothing predicts the first token of their responses, so it isn't "
            "trained, and no samples are drawn for them; add_bos=true begins every prompt with a token"
        )
