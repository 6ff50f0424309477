"""Batches: the order of examples, epochs, and the shards that workers compute."""

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

from data.tokenization import get_collate_fn, make_element, tokenize_batch
from utils import UserError


def split_name(dataset: str, split: str) -> str:
    """A dataset's split, for messages."""
    return f"datasets=[{dataset}], {split} split"


@dataclass
class Prompt:
    """A prompt with everything that is trained on after it, and where it came from."""

    text: str
    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: str
    dataset: str
    split: str
    truncation_mode: str  # which end of an over-long prompt is kept: keep_end or keep_start
    rows: list[int] = field(default_factory=list)
    # where the texts have been tokenized before, their ids, those of responses with their end
    prompt_ids: list[int] | None = None
    response_ids: list[list[int]] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)  # runs of trained tokens in each; see `make_element`
    target: int = 0  # which response is sft_target
    n_kept: int = 0  # tokens at the beginning of the prompt that stay, however it is cut
    # of unpaired data: the prompt that the dispreferred response of the only pair belongs to
    other: "Prompt | None" = None

    def place(self, pair: int) -> str:
        """Where a pair comes from, for messages."""
        row = f"row {self.rows[pair]}" if pair < len(self.rows) else f"prompt {self.text!r:.200}"
        return f"{split_name(self.dataset, self.split)}, {row}"


def shard_indices(n_examples: int, shard: tuple[int, int]) -> list[int | None]:
    """Which of a batch's examples belong to a shard (index, count) of it. All shards have equally many: None stands
    where there are no more, and the last example is taken again."""
    index, count = shard
    size = -(-n_examples // count)
    return [i if i < n_examples else None for i in range(index * size, (index + 1) * size)]


def example_counts(prompts: Sequence[Prompt]) -> np.ndarray:
    """How many pairs each prompt has, (N,)."""
    counts = getattr(prompts, "n_pairs", None)
    return np.array([len(prompt.pairs) for prompt in prompts], dtype=np.int64) if counts is None else counts


class Mixture(Sequence):
    """The prompts of several datasets, one dataset after the other."""

    def __init__(self, parts: list[Sequence[Prompt]]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.n_pairs = np.concatenate([example_counts(part) for part in parts])  # (N,)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Prompt:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]


class BatchIterator:
    """The batches of a split, in order; made by `preference_datasets.get_batch_iterator`.

    `n_batches` and `n_examples` are how many there will be, `epoch_size` how many examples of them an epoch has,
    `n_left_out` how many of each epoch fill no whole batch, `n_distinct` how many different ones there are in all.

    With a `shard` (index, count) it yields only that one of `count` shards of each batch, and tokenizes no other.
    With `mismatched` an example has its prompt with another's responses, too, under keys that begin so; see `mismatch`.
    """

    def __init__(self, parts: list[Sequence[Prompt]], tokenizer, batch_size: int, shuffle: bool, sft_mode: bool,
                 seed: int, n_epochs: int | None, n_examples: int | None, drop_last: bool, shard: tuple[int, int],
                 mismatched: bool = False, order: Iterable[int] | None = None, **lengths: int):  # fmt: skip
        """Args:
        parts: the prompts of each dataset.
        order: which of all their prompts, counted through, an epoch has before it is shuffled; None: each once.
        """
        self.prompts, self.tokenizer, self.lengths, self.shard = Mixture(parts), tokenizer, lengths, shard
        self.order = array("I", range(len(self.prompts)) if order is None else order)
        self.batch_size, self.shuffle, self.sft_mode, self.seed = batch_size, shuffle, sft_mode, seed
        self.mismatched = mismatched

        available = len(self.order) if sft_mode else int(self.prompts.n_pairs[self.order].sum())
        self.n_left_out = available % batch_size if drop_last else 0
        self.epoch_size = available - self.n_left_out
        totals = [n_epochs * self.epoch_size] if n_epochs is not None else [] if drop_last else [self.epoch_size]
        if n_examples is not None:
            totals.append(-(-n_examples // batch_size) * batch_size if drop_last else n_examples)
        self.n_examples = min(totals)
        self.n_batches = -(-self.n_examples // batch_size)
        self.n_distinct = available if self.n_examples >= self.epoch_size else self.n_examples

    @property
    def is_unpaired(self) -> bool:
        """Whether some examples are two single responses, each with a prompt of its own."""
        return any(getattr(part, "others", None) is not None for part in self.prompts.parts)

    def fingerprints(self) -> dict[str, str]:
        """A SHA-256, in hexadecimal, of all texts and pairs of each dataset in their order, by `split_name`."""
        digests = {}
        for part in self.prompts.parts:
            if (known := getattr(part, "fingerprint", None)) is not None:
                digests[split_name(part.dataset, part.split)] = known
                continue
            digest = hashlib.sha256()
            for prompt in part:
                entry = [prompt.text, prompt.responses, prompt.pairs, prompt.sft_target]
                digest.update(json.dumps(entry, default=int).encode())  # a dataset's function may give numpy's integers
            digests[split_name(part[0].dataset, part[0].split)] = digest.hexdigest()
        return digests

    def _epoch(self, order: MutableSequence[int]) -> Iterator[tuple[int, int]]:
        """One epoch's examples: the number of a prompt and which of its pairs; in SFT a prompt has one example."""
        n_pairs = self.prompts.n_pairs
        for number in order:
            for index in range(1 if self.sft_mode else int(n_pairs[number])):
                yield number, index

    def _tokenize(
        self, examples: list[tuple[Prompt, int]], partners: list[tuple[Prompt, int]] | None = None
    ) -> list[dict]:
        """Tokenize the prompt of each example with its own responses, or with its partner's."""
        whole = [(prompt, *partner) for (prompt, _), partner in zip(examples, partners or examples, strict=True)]
        texts = [
            (prompt.text, *chosen_and_rejected(partner, index, self.sft_mode)[0], prompt.truncation_mode)
            for prompt, partner, index in whole
            if prompt.prompt_ids is None
        ]
        try:
            tokenized = iter(tokenize_batch(texts, self.tokenizer, **self.lengths) if texts else [])
        except UserError as error:
            places = "\n".join(f"  {prompt.place(index)}" for prompt, index in examples)
            raise UserError(f"{error}\nIt is one of:\n{places}") from error
        elements = [next(tokenized) if example[0].prompt_ids is None else self._known(*example) for example in whole]
        if self.sft_mode:
            elements = [{k: v for k, v in element.items() if "rejected" not in k} for element in elements]
        return elements

    def _known(self, prompt: Prompt, partner: Prompt, index: int) -> dict:
        """The element of texts that have been tokenized before."""
        texts, ids = chosen_and_rejected(partner, index, self.sft_mode)
        runs = [partner.trained[i] for i in response_numbers(partner, index, self.sft_mode)]

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

    def _shuffled(self) -> Iterator[MutableSequence[int]]:
        """The numbers of the prompts in the order of each epoch; each shuffles the order of the one before."""
        epoch_seeds = np.random.RandomState(self.seed)
        order = self.order[:]
        while True:
            if self.shuffle:
                random.Random(int(epoch_seeds.randint(0, 2**32))).shuffle(order)
            yield order

    def distinct_examples(self, chunk_size: int = 1024) -> Iterator[tuple[dict[str, list | torch.Tensor], int]]:
        """Each example that a batch holds, once, in chunks: this shard of a chunk, and how many all shards have."""
        examples = itertools.islice(self._epoch(next(self._shuffled())), self.n_distinct)
        while chunk := list(itertools.islice(examples, chunk_size)):
            yield self._collated(chunk, self.shard), len(chunk)

    def indices(self, batch_index: int) -> list[int | None]:
        """Which of all examples, counted from 0, this shard of a batch holds; None: see `shard_indices`."""
        start = batch_index * self.batch_size
        indices = shard_indices(min(self.batch_size, self.n_examples - start), self.shard)
        return [start + i if i is not None else None for i in indices]

    def places(self) -> list[tuple[Prompt, int]]:
        """Of each example that a batch may hold, by `indices`, its prompt and which of its pairs it is."""
        return [(self.prompts[number], index) for number, index in self.numbers()]

    def numbers(self) -> list[tuple[int, int]]:
        """Of each example that a batch may hold, by `indices`, the number of its prompt and which of its pairs it is;
        one that comes several times has the same."""
        return list(itertools.islice(self._repeated(), self.n_examples))

    def _repeated(self) -> Iterator[tuple[int, int]]:
        for order in self._shuffled():
            yield from itertools.islice(self._epoch(order), self.epoch_size)

    def first(self, n: int) -> dict[str, list | torch.Tensor]:
        """The first `n` examples as a batch, whatever the shard."""
        return self._collated(list(itertools.islice(self._epoch(next(self._shuffled())), n)), (0, 1))

    def _collated(self, numbers: list[tuple[int, int]], shard: tuple[int, int]) -> dict[str, list | torch.Tensor]:
        batch = [(self.prompts[number], index) for number, index in numbers]
        own = [i if i is not None else -1 for i in shard_indices(len(batch), shard)]
        examples = [batch[i] for i in own]
        elements = self._tokenize(examples)
        if self.mismatched:
            others = self._tokenize(examples, [batch[i] for i in (partner_of(batch, i) for i in own)])
            for element, other in zip(elements, others, strict=True):
                element |= {f"mismatched_{key}": value for key, value in other.items()}
        return get_collate_fn(self.tokenizer)(elements)

    def _batches(self, skip: int) -> Iterator[dict[str, list | torch.Tensor]]:
        remaining = self.n_examples
        for order in self._shuffled():
            if remaining <= 0:
                return
            examples = itertools.islice(self._epoch(order), min(self.epoch_size, remaining))
            while batch := list(itertools.islice(examples, self.batch_size)):
                remaining -= len(batch)
                if skip > 0:
                    skip -= 1
                else:
                    yield self._collated(batch, self.shard)

    def batches(self, skip: int = 0) -> Iterator[dict[str, list | torch.Tensor]]:
        """The batches without the first `skip`, which are not tokenized."""
        return prefetched(self._batches(skip))

    def __iter__(self) -> Iterator[dict[str, list | torch.Tensor]]:
        return self.batches()


def chosen_and_rejected(prompt: Prompt, index: int, sft_mode: bool) -> tuple[list[str], list[list[int]]]:
    """Texts of the two responses of a prompt's pair, and their ids where they are known; in SFT twice the target's."""
    if sft_mode:
        return [prompt.sft_target] * 2, [prompt.response_ids[prompt.target]] * 2 if prompt.response_ids else []
    pair = prompt.pairs[index]
    return [prompt.responses[i] for i in pair], [prompt.response_ids[i] for i in pair] if prompt.response_ids else []


def response_numbers(prompt: Prompt, index: int, sft_mode: bool) -> tuple[int, int]:
    """Which of a prompt's responses are chosen and rejected in one of its pairs; in SFT twice the target."""
    return (prompt.target, prompt.target) if sft_mode else prompt.pairs[index]


def partner_of(batch: list[tuple[Prompt, int]], index: int) -> int:
    """The next example of a batch that has another prompt, the first one being next to the last; if none, the next."""
    after = [(index + step) % len(batch) for step in range(1, len(batch) + 1)]
    return next((i for i in after if batch[i][0].text != batch[index][0].text), after[0])


def mismatch(batch: dict) -> dict:
    """The batch of prompts with other prompts' responses that a batch holds beside its own, where `mismatched`.

    Which of all examples they are ('index') is kept.
    """
    prefix = "mismatched_"
    others = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
    return others | {key: batch[key] for key in ("index",) if key in batch}


def prefetched(items: Iterator, n_ahead: int = 4) -> Iterator:
    """The same items, made by a thread that stays up to `n_ahead` of them ahead."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as executor:
        ahead = deque(executor.submit(next, items, end) for _ in range(n_ahead))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(executor.submit(next, items, end))
            yield item
