"""Make batches of tokenized examples, in shuffled order, for several epochs, each worker with its own shard."""

import hashlib
import itertools
import json
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from data.tokenization import get_collate_fn, make_element, tokenize_batch
from utils import UserError

_MISMATCHED = "mismatched_"  # prefix of the keys of prompts with other prompts' responses


def split_name(dataset: str, split: str) -> str:
    """Return the name of a dataset's split for messages."""
    return f"datasets=[{dataset}], {split} split"


@dataclass
class Prompt:
    """A prompt with its responses, their preferences, and its place in the data."""

    text: str
    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: str
    dataset: str
    split: str
    truncation_mode: str  # which end of an overlong prompt is kept: keep_end or keep_start
    rows: list[int] = field(default_factory=list)  # the row of each pair
    prompt_ids: list[int] | None = None  # None: not tokenized yet
    response_ids: list[list[int]] = field(default_factory=list)  # with the end token
    trained: list[list[int]] = field(default_factory=list)  # each response's runs of trained tokens; see `make_element`
    target: int = 0  # index of sft_target in responses
    n_kept: int = 0  # leading tokens (such as BOS) that truncation never removes
    other: "Prompt | None" = None  # unpaired data: the prompt of the dispreferred response

    def place(self, pair: int) -> str:
        """Return the dataset, split and row of a pair for messages."""
        if self.other is not None:
            row = f"rows {self.rows[0]} and {self.other.rows[0]}"
        else:
            row = f"row {self.rows[pair]}" if pair < len(self.rows) else f"prompt {self.text!r:.200}"
        return f"{split_name(self.dataset, self.split)}, {row}"


def shard_indices(n_examples: int, shard: tuple[int, int]) -> list[int | None]:
    """Return the indices of a batch's examples in one shard, given as (index, count).

    All shards have the same size. After the last example, None stands for a repetition of that example.
    """
    index, count = shard
    size = -(-n_examples // count)
    return [i if i < n_examples else None for i in range(index * size, (index + 1) * size)]


def example_counts(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return the number of pairs of each prompt, (n_prompts,)."""
    counts = getattr(prompts, "n_pairs", None)
    return np.array([len(prompt.pairs) for prompt in prompts], dtype=np.int64) if counts is None else counts


class BatchIterator:
    """Iterates over the batches of a split, in order; made by `preference_datasets.get_batch_iterator`.

    Attributes:
        prompts: the concatenation of all datasets; `prompts.datasets` has the prompts of each dataset.
        n_pairs: the number of pairs of each prompt, (n_prompts,).
        n_batches, n_examples: totals over all epochs.
        epoch_size: examples per epoch, without the `n_dropped` that don't fill a batch.
        n_distinct: examples in use, each counted once for all epochs; as often as its dataset's weight repeats it.
        is_unpaired: some examples consist of two single responses, each with its own prompt.
    """

    def __init__(self, parts: list[Sequence[Prompt]], tokenizer, batch_size: int, shuffle: bool, sft_mode: bool,
                 seed: int, n_epochs: int | None, n_examples: int | None, drop_last: bool, shard: tuple[int, int],
                 mismatched: bool = False, order: Iterable[int] | None = None, **lengths: int):  # fmt: skip
        """See `preference_datasets.get_batch_iterator` for the other arguments.

        Args:
            parts: the prompts of each dataset.
            order: the indices of an epoch's prompts in the concatenation, before shuffling; None: each prompt once.
        """
        self.prompts, self.n_pairs = ConcatDataset(parts), np.concatenate([example_counts(part) for part in parts])
        self.tokenizer, self.lengths, self.shard = tokenizer, lengths, shard
        self.order = array("I", range(len(self.prompts)) if order is None else order)
        self.batch_size, self.shuffle, self.sft_mode, self.seed = batch_size, shuffle, sft_mode, seed
        self.mismatched = mismatched
        self.is_unpaired = any(getattr(part, "undesirable_rows", None) is not None for part in parts)

        available = len(self.order) if sft_mode else int(self.n_pairs[self.order].sum())
        self.n_dropped = available % batch_size if drop_last else 0
        self.epoch_size = available - self.n_dropped
        totals = [n_epochs * self.epoch_size] if n_epochs is not None else [] if drop_last else [self.epoch_size]
        if n_examples is not None:
            totals.append(-(-n_examples // batch_size) * batch_size if drop_last else n_examples)
        self.n_examples = min(totals)
        self.n_batches = -(-self.n_examples // batch_size)
        self.n_distinct = available if self.n_examples >= self.epoch_size else self.n_examples

    def fingerprints(self) -> dict[str, str]:
        """Map the `split_name` of each dataset to a SHA-256 (hexadecimal) of its texts and pairs."""
        digests = {}
        for part in self.prompts.datasets:
            if (known := getattr(part, "fingerprint", None)) is not None:
                digests[split_name(part.dataset, part.split)] = known
                continue
            digest = hashlib.sha256()
            for prompt in part:
                entry = [prompt.text, prompt.responses, prompt.pairs, prompt.sft_target]
                digest.update(json.dumps(entry, default=int).encode())  # loaders may return numpy integers
            digests[split_name(part[0].dataset, part[0].split)] = digest.hexdigest()
        return digests

    def _epoch_examples(self, order: MutableSequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the indices of the prompt and of its pair for each example; in SFT, each prompt is one example."""
        for number in order:
            for index in range(1 if self.sft_mode else int(self.n_pairs[number])):
                yield number, index

    def _tokenize(
        self, examples: list[tuple[Prompt, int]], partners: list[tuple[Prompt, int]] | None = None
    ) -> list[dict]:
        """Tokenize each example's prompt with its own responses or, if there are partners, with its partner's."""
        # prompt, the prompt whose responses it gets, and the index of their pair
        triples = [(prompt, *partner) for (prompt, _), partner in zip(examples, partners or examples, strict=True)]
        texts = [
            (prompt.text, *chosen_and_rejected(partner, index, self.sft_mode)[0], prompt.truncation_mode)
            for prompt, partner, index in triples
            if prompt.prompt_ids is None
        ]
        try:
            tokenized = iter(tokenize_batch(texts, self.tokenizer, **self.lengths) if texts else [])
        except UserError as error:
            places = "\n".join(f"  {prompt.place(index)}" for prompt, index in examples)
            raise UserError(f"{error}\nThe text is in one of:\n{places}") from error
        elements = [
            next(tokenized) if prompt.prompt_ids is None else self._element_of_ids(prompt, partner, index)
            for prompt, partner, index in triples
        ]
        if self.sft_mode:
            elements = [{k: v for k, v in element.items() if "rejected" not in k} for element in elements]
        return elements

    def _element_of_ids(self, prompt: Prompt, partner: Prompt, index: int) -> dict:
        """Make the element of an example whose texts are tokenized already."""
        texts, ids = chosen_and_rejected(partner, index, self.sft_mode)
        numbers = (partner.target, partner.target) if self.sft_mode else partner.pairs[index]  # chosen, rejected
        runs = [partner.trained[number] for number in numbers]

        def element(prompt: Prompt, texts: list[str], ids: list[list[int]], runs: list[list[int]]) -> dict:
            prompt_ids, n_kept = prompt.prompt_ids, prompt.n_kept
            if self.lengths.get("add_bos") and prompt_ids[:1] != [self.tokenizer.bos_token_id]:
                prompt_ids, n_kept = [self.tokenizer.bos_token_id, *prompt_ids], n_kept + 1
            lengths = self.lengths["max_length"], self.lengths["max_prompt_length"], n_kept
            return make_element([prompt.text, *texts], prompt_ids, ids, prompt.truncation_mode, *lengths, runs)

        if prompt.other is None:
            return element(prompt, texts, ids, runs)
        chosen = element(prompt, [texts[0]] * 2, [ids[0]] * 2, [runs[0]] * 2)
        rejected = element(prompt.other, [texts[1]] * 2, [ids[1]] * 2, [runs[1]] * 2)
        return chosen | {key: value for key, value in rejected.items() if key.startswith("rejected")}

    def _epoch_orders(self) -> Iterator[MutableSequence[int]]:
        """Yield the indices of the prompts in each epoch's order; an epoch shuffles the order of the previous one."""
        epoch_seeds = np.random.RandomState(self.seed)
        order = self.order[:]
        while True:
            if self.shuffle:
                random.Random(int(epoch_seeds.randint(0, 2**32))).shuffle(order)
            yield order

    def distinct_examples(self) -> Iterator[tuple[dict[str, list | torch.Tensor], int]]:
        """Yield every distinct example once, in batches: this worker's shard of a batch, and the whole batch's size."""
        examples = itertools.islice(self._epoch_examples(next(self._epoch_orders())), self.n_distinct)
        while batch := list(itertools.islice(examples, self.batch_size)):
            yield self._collate(batch, self.shard), len(batch)

    def indices(self, batch_index: int) -> list[int | None]:
        """Return the numbers of the examples in this shard of a batch, counted from the first batch's first example.

        None stands for a repetition; see `shard_indices`.
        """
        start = batch_index * self.batch_size
        indices = shard_indices(min(self.batch_size, self.n_examples - start), self.shard)
        return [start + i if i is not None else None for i in indices]

    def examples(self) -> list[tuple[Prompt, int]]:
        """Return the prompt and the pair's index of every example, over all epochs."""
        return [(self.prompts[number], index) for number, index in self.example_numbers()]

    def example_numbers(self) -> list[tuple[int, int]]:
        """Return the indices of the prompt and of its pair for every example, over all epochs."""
        epochs = (itertools.islice(self._epoch_examples(order), self.epoch_size) for order in self._epoch_orders())
        return list(itertools.islice(itertools.chain.from_iterable(epochs), self.n_examples))

    def first_examples(self, n: int) -> dict[str, list | torch.Tensor]:
        """Return the first `n` examples as a batch, the same on all shards."""
        return self._collate(list(itertools.islice(self._epoch_examples(next(self._epoch_orders())), n)), (0, 1))

    def _collate(self, numbers: list[tuple[int, int]], shard: tuple[int, int]) -> dict[str, list | torch.Tensor]:
        """Tokenize and pad one shard of a batch.

        Args:
            numbers: the indices of the prompt and of its pair for each example of the whole batch.
        """
        batch = [(self.prompts[number], index) for number, index in numbers]
        in_shard = [i if i is not None else -1 for i in shard_indices(len(batch), shard)]
        examples = [batch[i] for i in in_shard]
        elements = self._tokenize(examples)
        if self.mismatched:
            others = self._tokenize(examples, [batch[i] for i in (next_other_prompt(batch, i) for i in in_shard)])
            for element, other in zip(elements, others, strict=True):
                element |= {f"{_MISMATCHED}{key}": value for key, value in other.items()}
        return get_collate_fn(self.tokenizer)(elements)

    def _batches(self, skip: int) -> Iterator[dict[str, list | torch.Tensor]]:
        remaining = self.n_examples
        for order in self._epoch_orders():
            if remaining <= 0:
                return
            examples = itertools.islice(self._epoch_examples(order), min(self.epoch_size, remaining))
            while batch := list(itertools.islice(examples, self.batch_size)):
                remaining -= len(batch)
                if skip > 0:
                    skip -= 1
                else:
                    yield self._collate(batch, self.shard)

    def batches(self, skip: int = 0) -> Iterator[dict[str, list | torch.Tensor]]:
        """Yield the batches after the first `skip`, which aren't tokenized."""
        return prefetched(self._batches(skip))

    __iter__ = batches


def chosen_and_rejected(prompt: Prompt, index: int, sft_mode: bool) -> tuple[list[str], list[list[int]]]:
    """Return the texts of a pair's responses, and their ids if they are tokenized; in SFT both are the target."""
    if sft_mode:
        return [prompt.sft_target] * 2, [prompt.response_ids[prompt.target]] * 2 if prompt.response_ids else []
    pair = prompt.pairs[index]
    return [prompt.responses[i] for i in pair], [prompt.response_ids[i] for i in pair] if prompt.response_ids else []


def next_other_prompt(batch: list[tuple[Prompt, int]], index: int) -> int:
    """Return the index of the next example (cyclically) with another prompt; if there is none, of the next example."""
    after = [(index + step) % len(batch) for step in range(1, len(batch) + 1)]
    return next((i for i in after if batch[i][0].text != batch[index][0].text), after[0])


def mismatched_batch(batch: dict) -> dict:
    """Return the batch that is stored under the keys 'mismatched_...' of a batch, with the same 'index'."""
    others = {key.removeprefix(_MISMATCHED): value for key, value in batch.items() if key.startswith(_MISMATCHED)}
    return others | {key: batch[key] for key in ("index",) if key in batch}


def prefetched(items: Iterator, n_ahead: int = 4) -> Iterator:
    """Yield the items of an iterator; a thread computes up to `n_ahead` of them in advance."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as executor:
        ahead = deque(executor.submit(next, items, end) for _ in range(n_ahead))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(executor.submit(next, items, end))
            yield item
