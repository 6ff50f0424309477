"""Read tokenized prompts from a memory-mapped file that `data.preparation` has written."""

import json
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.batches import Prompt, split_name
from utils import UserError

TEXTS, IDS = pa.list_(pa.string()), pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt": pa.string(),
        "responses": TEXTS,
        "pairs": IDS,  # flat: preferred, dispreferred, preferred, ...
        "target": pa.int32(),
        "label": pa.bool_(),
        "n_kept": pa.int32(),  # leading tokens of the prompt that truncation keeps: BOS, or none
        "prompt_ids": IDS,
        "response_ids": pa.list_(IDS),
        "trained": pa.list_(IDS),  # each response's runs of trained tokens, as start, end, start, end, ...
    }
)


class PreparedPrompts(Sequence):
    """The tokenized prompts of a split; each is read from the memory-mapped file when it is indexed.

    `drop` drops examples in memory; the file stays as it is.
    """

    def __init__(self, directory: str, split: str, dataset: str, truncation_mode: str, accepted_kinds: Sequence[str]):
        self.dataset, self.split, self.truncation_mode = dataset, split, truncation_mode
        with open(os.path.join(directory, "info.json"), encoding="utf-8") as file:
            self.info = json.load(file)
        self.fingerprint = self.info[split]["fingerprint"]
        table = pa.ipc.open_file(pa.memory_map(os.path.join(directory, f"{split}.arrow"))).read_all()
        self.columns = {name: table[name] for name in SCHEMA.names}
        self._all_pairs = pc.list_flatten(self.columns["pairs"]).to_numpy().reshape(-1, 2)
        self.kept = np.ones(len(self._all_pairs), dtype=bool)  # mask of the pairs that weren't dropped
        counts = self._list_lengths("pairs") // 2
        self._row_of_pair = np.repeat(np.arange(len(counts)), counts)
        self._first_pair = np.concatenate([[0], counts.cumsum()])
        self.file_rows = np.arange(len(counts))  # the row of each prompt in the file
        # unpaired data: the rows of the undesirable responses; `file_rows` then has those of the desirable ones
        self.undesirable_rows: np.ndarray | None = None
        self.n_pairs = counts
        self.n_labelled: dict[str, int] = {}  # unpaired data: the number of responses by label
        labels = self.columns["label"]
        if len(labels) and labels.null_count == 0:
            self._pair_by_label(labels.to_numpy(), accepted_kinds)

    def _pair_by_label(self, labels: np.ndarray, accepted_kinds: Sequence[str]):
        """Pair each desirable response with an undesirable one, repeating the rarer kind; SFT uses only the desirable.

        Raises: UserError if all have the same label.
        """
        desirable, undesirable = np.flatnonzero(labels), np.flatnonzero(~labels)
        self.n_labelled = {"desirable": len(desirable), "undesirable": len(undesirable)}
        if "unpaired" not in accepted_kinds:
            self.file_rows, self.n_pairs = desirable, np.zeros(len(desirable), dtype=np.int64)
            return
        if min(len(desirable), len(undesirable)) == 0:
            raise UserError(
                f"{split_name(self.dataset, self.split)}: all {len(labels)} responses have the same label; "
                "unpaired data need both kinds; add data, or hold out more with test_fraction"
            )
        n = max(len(desirable), len(undesirable))
        self.file_rows, self.undesirable_rows = np.resize(desirable, n), np.resize(np.roll(undesirable, -1), n)
        self.n_pairs = np.ones(n, dtype=np.int64)

    def _list_lengths(self, name: str) -> np.ndarray:
        return pc.list_value_length(self.columns[name]).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.file_rows)

    def __getitem__(self, index: int) -> Prompt:
        prompt = self._prompt(int(self.file_rows[index]))
        if self.undesirable_rows is not None:
            prompt.other = other = self._prompt(int(self.undesirable_rows[index]))
            prompt.responses = [*prompt.responses, *other.responses]
            prompt.response_ids = [*prompt.response_ids, *other.response_ids]
            prompt.trained = [*prompt.trained, *other.trained]
            prompt.pairs = [(0, 1)]
        return prompt

    def _prompt(self, file_row: int) -> Prompt:
        """Read a row of the file."""
        cells = {name: column[file_row] for name, column in self.columns.items()}
        responses, target = cells["responses"].as_py(), cells["target"].as_py()
        first, end = self._first_pair[file_row], self._first_pair[file_row + 1]
        pairs = self._all_pairs[first:end]
        if self.undesirable_rows is None:
            pairs = pairs[self.kept[first:end]]
        return Prompt(
            cells["prompt"].as_py(),
            responses,
            [tuple(pair) for pair in pairs.tolist()],
            responses[target],
            self.dataset,
            self.split,
            self.truncation_mode,
            rows=[cells["row"].as_py()] * max(1, len(pairs)),
            prompt_ids=cells["prompt_ids"].values.to_numpy().tolist(),
            response_ids=[ids.values.to_numpy().tolist() for ids in cells["response_ids"].values],
            trained=[runs.values.to_numpy().tolist() for runs in cells["trained"].values],
            target=target,
            n_kept=cells["n_kept"].as_py(),
        )

    # ---- lengths ----------------------------------------------------------------------------------------------------

    def lengths(self, sft_mode: bool, add_bos: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the number of tokens in each example's prompt and in its longer response, and its prompt's index.

        All have shape (n_examples,). With `sft_mode`, the response is the SFT target. Prompts are counted with the
        token added by `add_bos`. In unpaired data, each response has its own prompt; then both numbers are those of the
        longer sequence.
        """
        n_responses = self._list_lengths("response_ids")
        first_response = np.concatenate([[0], n_responses.cumsum()])
        response_lengths = pc.list_value_length(pc.list_flatten(self.columns["response_ids"])).to_numpy()
        prompt_lengths = self._list_lengths("prompt_ids")
        if add_bos:  # a prompt from a template may begin with the token already
            prompt_lengths = prompt_lengths + (self.columns["n_kept"].to_numpy() == 0)
        if sft_mode:
            targets = self.columns["target"].to_numpy()[self.file_rows]
            return (
                prompt_lengths[self.file_rows],
                response_lengths[first_response[self.file_rows] + targets],
                np.arange(len(self)),
            )
        if self.undesirable_rows is not None:
            sides = np.stack([self.file_rows, self.undesirable_rows])  # (2, n_examples)
            prompts, responses = prompt_lengths[sides], response_lengths[first_response[sides]]
            longer, numbers = (prompts + responses).argmax(0), np.arange(len(self))
            return prompts[longer, numbers], responses[longer, numbers], numbers
        prompt_of_pair, pairs = self._row_of_pair[self.kept], self._all_pairs[self.kept]
        both = response_lengths[first_response[prompt_of_pair][:, None] + pairs]
        return prompt_lengths[prompt_of_pair], both.max(1, initial=0), prompt_of_pair

    def count_empty_prompts(self) -> int:
        """Return the number of prompts without tokens."""
        sides = [rows for rows in (self.file_rows, self.undesirable_rows) if rows is not None]
        rows = np.unique(np.concatenate(sides))  # each once: the rarer label's prompts are repeated
        return int((self._list_lengths("prompt_ids")[rows] == 0).sum())

    def drop(self, unwanted: np.ndarray, sft_mode: bool):
        """Drop the examples that a mask of shape (n_examples,) selects."""
        if sft_mode or self.undesirable_rows is not None:
            self.file_rows = self.file_rows[~unwanted]
            if self.undesirable_rows is not None:
                self.undesirable_rows = self.undesirable_rows[~unwanted]
            self.n_pairs = self.n_pairs[~unwanted]
            return
        self.kept[np.flatnonzero(self.kept)[unwanted]] = False
        self.n_pairs = np.bincount(self._row_of_pair[self.kept], minlength=len(self.n_pairs)).astype(np.int64)

    def are_identical_when_truncated(self, max_length: int, max_prompt_length: int, add_bos: bool) -> np.ndarray:
        """Return a mask of the pairs whose responses are the same tokens after truncation; see `make_element`."""
        if self.undesirable_rows is not None:  # the responses of a pair have different prompts
            return np.zeros(len(self), dtype=bool)
        prompts, responses, prompt_of_pair = self.lengths(sft_mode=False, add_bos=add_bos)
        is_cut = (prompts + responses > max_length) & (np.minimum(prompts, max_prompt_length) + responses > max_length)
        identical, pairs = np.zeros(len(is_cut), dtype=bool), self._all_pairs[self.kept]
        for index in np.flatnonzero(is_cut):
            all_ids = self.columns["response_ids"][int(prompt_of_pair[index])].values
            cut = [all_ids[int(i)].values[: max_length - max_prompt_length] for i in pairs[index]]
            identical[index] = cut[0].equals(cut[1])
        return identical
