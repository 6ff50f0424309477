"""Files and hub datasets, read, checked and tokenized once, and then memory-mapped by every worker of every run.

What is kept is keyed by the rows, the settings and the tokenizer; whoever comes first makes it, the others wait.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from data import chat, diagnosis, reading
from data.batches import Prompt, prefetched, split_name
from data.choice import Choice, Settings
from data.formats import BadExample, Example, Format, recognize
from data.locations import Location, choose_splits, locate
from utils import UserError, get_local_dir, hides_progress, rank0_print

VERSION = 1  # of what is kept: another one makes it anew
_CHUNK = 1024  # rows that are tokenized at a time
_SHOWN = 10  # bad rows
_LOOKED_AT = 100  # rows that tell the format
_SAID: set[str] = set()  # what has been said to be read
_TEXTS, _IDS = pa.list_(pa.string()), pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt": pa.string(),
        "responses": _TEXTS,
        "pairs": _IDS,  # flat: preferred, dispreferred, preferred, ...
        "target": pa.int32(),
        "label": pa.bool_(),
        "n_kept": pa.int32(),
        "prompt_ids": _IDS,
        "response_ids": pa.list_(_IDS),
    }
)


# ---- where the rows come from ---------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The rows of a split, a chunk at a time, and where they are."""

    where: str
    label: str
    split: str
    fingerprint: str
    n_rows: int | None
    dataset: object = None  # of the datasets library; or a list
    place: object = None  # number of a row -> where it is, in words
    lines: list[tuple[str, str]] = field(default_factory=list)  # files, read line by line

    def chunks(self, size: int) -> Iterator[list[tuple[int, str, dict | diagnosis.Fault]]]:
        """Number, place (or an empty text) and row, or what is wrong with it."""
        if self.dataset is not None:
            for start in range(0, self.n_rows, size):
                rows = _row_dicts(self.dataset[start : start + size])
                yield [(start + number, "", row) for number, row in enumerate(rows)]
            return
        chunk = []
        for number, (place, row) in enumerate(diagnosis.readable_rows(self.lines)):
            chunk.append((number, place, row))
            if len(chunk) == size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _row_dicts(rows: list[dict] | pa.Table | dict[str, list]) -> list[dict]:
    if isinstance(rows, pa.Table):
        return rows.to_pylist()
    if isinstance(rows, dict):
        return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return rows


def open_rows(location: Location, split: str, cache_dir: str | None, silent: bool) -> Rows:
    """The rows of a split. JSON Lines that the library can't read are read line by line.

    Raises: UserError if they can't be read, naming the file, the line and the remedy.
    """
    where, label = split_name(location.given, split), f"{location.given} ({split})"
    silent = silent or label in _SAID  # both splits are prepared whenever one is asked for
    _SAID.add(label)
    files = location.files[split.partition("[")[0]] if location.files is not None else None
    if files and (reason := reading.why_not_these(files)):
        raise UserError(f"{where}: {reason}")
    try:
        rows = reading.read_rows(
            where, location.path, split, files, cache_dir, "give local files", location.config, silent, label,
            csv_as_texts=True,
        )  # fmt: skip
    except reading.UnreadableRows as error:
        named = [(file, file) for file in files or []]
        if "[" in split or not (named and diagnosis.are_json_lines(named)):
            raise
        rank0_print(f"{label}: read line by line, as the library can't: {str(error).splitlines()[0]}")
        return Rows(where, label, split, _of_files(files), None, lines=named)
    made_of = [file["filename"] for file in rows.cache_files]

    def place(row: int) -> str:
        return reading.row_place(location.path, split, row, cache_dir, files)

    # objects whose fields differ from row to row are kept as JSON, which the library has to decode
    holds_json = "Json(" in str(rows.features)
    dataset = rows if holds_json else rows.with_format("arrow")
    return Rows(where, label, split, _of_files(made_of), len(rows), dataset, place)


def rows_of_list(name: str, rows: list[dict]) -> Rows:
    """Rows given in Python.

    Raises: UserError if they are no rows.
    """
    where = f"datasets=[{name}]"
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {number}: {row!r:.60} is no dict of fields")
    try:
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: expected rows of texts, numbers, lists and dicts: {error}") from error
    return Rows(where, name, "train", digest, len(rows), rows)


def _of_files(files: Iterable[str]) -> str:
    stats = [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


# ---- making it ------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes the prompts of a split to a file, and counts."""

    def __init__(self, path: str):
        self.sink = pa.OSFile(path, "wb")
        self.writer = pa.ipc.new_file(self.sink, SCHEMA)
        self.digest, self.n_prompts, self.n_pairs = hashlib.sha256(), 0, 0

    def write(self, records: list[dict]):
        for record in records:
            texts = [record["prompt"], record["responses"], record["pairs"], record["target"], record["label"]]
            self.digest.update(json.dumps(texts).encode())
            self.n_pairs += len(record["pairs"]) // 2
        self.n_prompts += len(records)
        if records:
            columns = ([record[name] for record in records] for name in SCHEMA.names)
            arrays = [_array(values, of.type) for values, of in zip(columns, SCHEMA, strict=True)]
            self.writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))

    def close(self) -> dict:
        self.writer.close()
        self.sink.close()
        return {"fingerprint": self.digest.hexdigest(), "n_prompts": self.n_prompts, "n_pairs": self.n_pairs}


def _array(values: list, kind: pa.DataType) -> pa.Array:
    """As `pa.array`, but lists of numbers in a fraction of its time."""
    if not pa.types.is_list(kind) or kind == _TEXTS:
        return np.fromiter(values, np.int32, len(values)) if kind == pa.int32() else pa.array(values, kind)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, _array(list(chain.from_iterable(values)), kind.value_type))


class _Bad:
    """Bad rows of a split: how many of each kind, and the first few."""

    def __init__(self, rows: Rows):
        self.rows, self.kinds, self.first = rows, Counter(), []

    def add(self, number: int, place: str, kind: str, reason: str):
        self.kinds[kind] += 1
        if len(self.first) < _SHOWN:
            self.first.append((number, place, reason))

    def raise_if_any(self):
        """Raises: UserError that names them."""
        if not self.first:
            return
        lines = []
        for number, place, reason in self.first:
            at = place or (f"row {number}{self.rows.place(number) if self.rows.place else ''}")
            lines.append(f"  {at}: {reason}")
        raise UserError(
            f"{self.rows.where}: rows that can't be used:\n" + "\n".join(lines) + "\nCorrect them, or leave out and "
            "count all such rows by on_bad_example=skip"
        )


def _prompt_key(example: Example) -> bytes:
    """What tells prompts apart, whatever the tokenizer; texts without a prompt are told apart by themselves."""
    told_by = example.prompt or example.responses
    return hashlib.sha256(json.dumps(told_by, sort_keys=True).encode()).digest()[:8]


def _number(key: bytes) -> float:
    return int.from_bytes(key, "big") / 2**64


def _records(chunk: list, read: Format, renderer: chat.Renderer, bad: _Bad) -> list[tuple[bytes, dict]]:
    """The rows of a chunk that can be used, with the keys of their prompts."""
    usable: list[tuple[int, Example, chat.Rendered]] = []
    for number, place, row in chunk:
        try:
            if isinstance(row, diagnosis.Fault):
                raise BadExample("broken row", row.reason)
            example = read.read(row)
            usable.append((number, example, renderer.render(example)))
        except BadExample as error:
            bad.add(number, place, error.kind, str(error))
    tokenized = renderer.tokenize([rendered for *_, rendered in usable])
    records = []
    for (number, example, rendered), (prompt_ids, response_ids) in zip(usable, tokenized, strict=True):
        has_bos = rendered.is_templated and prompt_ids[:1] == [renderer.tokenizer.bos_token_id]
        record = {
            "row": number,
            "prompt": rendered.prompt,
            "responses": rendered.responses,
            "pairs": [i for pair in example.pairs for i in pair],
            "target": example.target,
            "label": example.label,
            "n_kept": int(has_bos),
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
        }
        records.append((_prompt_key(example), record))
    return records


def _make(directory: str, sources: dict[str, Rows], settings: Settings, renderer: chat.Renderer, read: Format):
    """Write the files of both splits, and what there is to say of them, into a directory.

    Without a source for 'test' it holds a part of the other's prompts: those with the smallest hashes.
    """
    limit = 0.0 if "test" in sources else settings.test_fraction
    info = _make_once(directory, sources, settings, renderer, read, limit)
    if "test" not in sources and info["test"]["n_prompts"] == 0 and info["smallest"] is not None:
        # few prompts, and none fell into the part: hold out one
        info = _make_once(directory, sources, settings, renderer, read, info["smallest"])
    with open(os.path.join(directory, "info.json"), "w", encoding="utf-8") as file:
        json.dump(info | {"format": read.description}, file)


def _make_once(directory, sources, settings, renderer, read, limit) -> dict:
    writers = {role: _Writer(os.path.join(directory, f"{role}.arrow")) for role in ("train", "test")}
    info, smallest = {}, None
    for role, rows in sources.items():
        bad, n_read = _Bad(rows), 0
        with tqdm(total=rows.n_rows, desc=f"Tokenizing {rows.label}", unit="row", disable=hides_progress()) as progress:
            # in a thread: a tokenizer uses all cores while others are written
            for n_rows, records in prefetched(
                ((len(chunk), _records(chunk, read, renderer, bad)) for chunk in rows.chunks(_CHUNK)), n_ahead=2
            ):
                n_read += n_rows
                held_out = []
                if "test" not in sources:
                    smallest = min([_number(key) for key, _ in records] + ([smallest] if smallest is not None else []),
                                   default=None)  # fmt: skip
                    held_out = [record for key, record in records if _number(key) <= limit]
                    records = [item for item in records if _number(item[0]) > limit]
                writers[role].write([record for _, record in records])
                writers["test"].write(held_out)
                progress.update(n_rows)
                if not settings.skips_bad and len(bad.first) >= _SHOWN:
                    break
        if not settings.skips_bad:
            bad.raise_if_any()
        info[f"{role}_rows"] = {"n_read": n_read, "bad": dict(bad.kinds), "split": rows.split}
    return info | {role: writer.close() for role, writer in writers.items()} | {"smallest": smallest}


def _tokenizer_fingerprint(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    tokens = json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(f"{model}{tokens}".encode()).hexdigest()


def prepare(
    name: str,
    source: Location | list[dict],
    settings: Settings,
    tokenizer,
    truncation_mode: str,
    loss_takes: Sequence[str],
    cache_dir: str,
    silent: bool,
) -> tuple["PreparedPrompts", "PreparedPrompts"]:
    """Training and evaluation prompts of a dataset, made if they aren't there yet.

    Args:
        source: where its rows are, or the rows.
        loss_takes: what can be trained on: 'pairs', 'targets', 'unpaired'.

    Raises: UserError if rows can't be used, or are none of these, naming the place and the remedy.
    """
    renderer = chat.Renderer(tokenizer, settings.chat_template)
    if isinstance(source, list):
        sources = {"train": rows_of_list(name, source)}
    else:
        sources = _open_splits(source, settings, cache_dir, silent)
    read = _recognized(sources["train"], settings, loss_takes)
    key = json.dumps(
        [VERSION, {role: [rows.fingerprint, rows.split, rows.n_rows] for role, rows in sources.items()},
         asdict(settings), renderer.template, _tokenizer_fingerprint(tokenizer), read.description], sort_keys=True,
    )  # fmt: skip
    directory = os.path.join(cache_dir, "prepared", hashlib.sha256(key.encode()).hexdigest()[:32])
    try:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not os.path.exists(directory):
                partial = f"{directory}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
                os.makedirs(partial)
                try:
                    _make(partial, sources, settings, renderer, read)
                    os.rename(partial, directory)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"datasets=[{name}]: can't keep what is tokenized in {directory}: {error}\nMake room, or choose another "
            "place by local_dirs=[DIR]"
        ) from error
    return tuple(PreparedPrompts(directory, role, name, truncation_mode, loss_takes) for role in ("train", "test"))


def _open_splits(location: Location, settings: Settings, cache_dir: str, silent: bool) -> dict[str, Rows]:
    """Rows to train on and, where there is a split for it, to evaluate on."""
    if location.files is not None:
        there = list(location.files)
    else:
        there = reading.split_names(location.where, location.path, location.config, cache_dir, "give local files")
    train, test = choose_splits(there, settings.train_split, settings.test_split, location.where)
    splits = {"train": train} | ({"test": test} if test is not None else {})
    return {role: open_rows(location, split, cache_dir, silent) for role, split in splits.items()}


def _recognized(rows: Rows, settings: Settings, loss_takes: Sequence[str]) -> Format:
    """The format, if the loss can take it."""
    first = next(rows.chunks(_LOOKED_AT), [])
    good = [row for *_, row in first if isinstance(row, dict)]
    if not good:
        _raise_for(rows, first)
    read = recognize(good, settings.fields, rows.where)
    if read.is_unpaired and not {"unpaired", "targets"} & set(loss_takes):
        raise UserError(f"{rows.where}: it has {read.description}: train with loss=kto, or loss=sft on the desirable")
    if not read.has_pairs and not read.is_unpaired and "targets" not in loss_takes:
        raise UserError(f"{rows.where}: it has {read.description}, and no pairs of responses: take loss=sft")
    return read


def _raise_for(rows: Rows, first: list):
    bad = _Bad(rows)
    for number, place, fault in first:
        bad.add(number, place, "broken row", fault.reason)
    bad.raise_if_any()
    raise UserError(f"{rows.where}: there are no rows")


# ---- using it -------------------------------------------------------------------------------------------------------


class PreparedPrompts(Sequence):
    """The prompts of a split, tokenized, in a memory-mapped file: made of it one by one as they are asked for."""

    def __init__(self, directory: str, role: str, dataset: str, truncation_mode: str, loss_takes: Sequence[str]):
        self.directory, self.role, self.dataset, self.split = directory, role, dataset, role
        self.truncation_mode = truncation_mode
        with open(os.path.join(directory, "info.json"), encoding="utf-8") as file:
            self.info = json.load(file)
        self.fingerprint = self.info[role]["fingerprint"]
        reader = pa.ipc.open_file(pa.memory_map(os.path.join(directory, f"{role}.arrow")))
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.ends = np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)
        self.kept: np.ndarray | None = None  # which pairs, of all counted through; None: all
        self._all_pairs = self._flat("pairs").reshape(-1, 2)
        counts = self._list_lengths("pairs") // 2
        self._first_pair = np.concatenate([[0], counts.cumsum()])
        self.numbers, self.others = np.arange(len(counts)), None  # rows of the file; of unpaired data: both sides'
        self.n_pairs = counts
        labels = self._column("label")
        if len(labels) and labels.null_count == 0:
            self._match(labels.to_numpy(zero_copy_only=False), loss_takes)

    def _match(self, labels: np.ndarray, loss_takes: Sequence[str]):
        """Of single responses: for SFT the desirable ones; otherwise each with one of the other kind, of which there
        may be fewer: then some come again."""
        desirable, undesirable = np.flatnonzero(labels), np.flatnonzero(~labels)
        if "unpaired" not in loss_takes:
            self.numbers, self.n_pairs = desirable, np.zeros(len(desirable), dtype=np.int64)
            return
        if min(len(desirable), len(undesirable)) == 0:
            raise UserError(
                f"{split_name(self.dataset, self.split)}: all {len(labels)} responses have the same label; "
                "loss=kto needs both kinds; add data, or have more held out by test_fraction"
            )
        n = max(len(desirable), len(undesirable))
        self.numbers, self.others = np.resize(desirable, n), np.resize(np.roll(undesirable, -1), n)
        self.n_pairs = np.ones(n, dtype=np.int64)

    def _column(self, name: str) -> pa.Array:
        arrays = [batch.column(name) for batch in self.batches]
        return pa.concat_arrays(arrays) if arrays else pa.array([], SCHEMA.field(name).type)

    def _flat(self, name: str) -> np.ndarray:
        return self._column(name).flatten().to_numpy()

    def _list_lengths(self, name: str) -> np.ndarray:
        lengths = [batch.column(name).value_lengths().to_numpy() for batch in self.batches]
        return np.concatenate([*lengths, np.zeros(0, dtype=np.int32)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Prompt:
        prompt = self._prompt(int(self.numbers[index]))
        if self.others is not None:
            prompt.other = other = self._prompt(int(self.others[index]))
            prompt.responses = [*prompt.responses, *other.responses]
            prompt.response_ids = [*prompt.response_ids, *other.response_ids]
            prompt.pairs = [(0, 1)]
        return prompt

    def _prompt(self, number: int) -> Prompt:
        part = int(np.searchsorted(self.ends, number, side="right"))
        batch, offset = self.batches[part], number - (int(self.ends[part - 1]) if part else 0)
        responses = batch.column("responses")[offset].as_py()
        first, end = self._first_pair[number], self._first_pair[number + 1]
        pairs = self._all_pairs[first:end]
        if self.kept is not None and self.others is None:
            pairs = pairs[self.kept[first:end]]
        row, target = batch.column("row")[offset].as_py(), batch.column("target")[offset].as_py()
        return Prompt(
            batch.column("prompt")[offset].as_py(),
            responses,
            [tuple(pair) for pair in pairs.tolist()],
            responses[target],
            self.dataset,
            self.split,
            self.truncation_mode,
            rows=[row] * max(1, len(pairs)),
            prompt_ids=batch.column("prompt_ids")[offset].values.to_numpy().tolist(),
            response_ids=[ids.values.to_numpy().tolist() for ids in batch.column("response_ids")[offset].values],
            target=target,
            n_kept=batch.column("n_kept")[offset].as_py(),
        )

    # ---- lengths ----------------------------------------------------------------------------------------------------

    def lengths(self, sft_mode: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens in each example's prompt, in its longest response, and its prompt's number: (n_examples,) each."""
        n_responses = self._list_lengths("response_ids")
        first_response = np.concatenate([[0], n_responses.cumsum()])
        inner = [batch.column("response_ids").flatten().value_lengths().to_numpy() for batch in self.batches]
        of_response = np.concatenate([*inner, np.zeros(0, dtype=np.int32)])
        of_prompt = self._list_lengths("prompt_ids")
        if sft_mode:
            targets = self._column("target").to_numpy()[self.numbers]
            return of_prompt[self.numbers], of_response[first_response[self.numbers] + targets], np.arange(len(self))
        if self.others is not None:
            sides = (self.numbers, self.others)
            prompts = np.maximum(*(of_prompt[side] for side in sides))
            return prompts, np.maximum(*(of_response[first_response[side]] for side in sides)), np.arange(len(self))
        counts = np.diff(self._first_pair)
        number = np.repeat(np.arange(len(counts)), counts)
        kept = slice(None) if self.kept is None else self.kept
        number, pairs = number[kept], self._all_pairs[kept]
        both = of_response[first_response[number][:, None] + pairs]
        return of_prompt[number], both.max(1, initial=0), number

    def count_empty(self) -> int:
        """How many prompts have no token."""
        return int((self._list_lengths("prompt_ids")[self.numbers] == 0).sum())

    def leave_out(self, too_long: np.ndarray, sft_mode: bool):
        """Leave these examples out, a mask as `lengths` counts them; once."""
        if sft_mode or self.others is not None:
            self.numbers = self.numbers[~too_long]
            self.others = self.others[~too_long] if self.others is not None else None
            self.n_pairs = self.n_pairs[~too_long]
            return
        self.kept = ~too_long
        number = np.repeat(np.arange(len(self.n_pairs)), np.diff(self._first_pair))
        self.n_pairs = np.bincount(number[self.kept], minlength=len(self.n_pairs)).astype(np.int64)


ROWS: dict[str, list[dict]] = {}  # rows given in Python, by a name that `datasets` then knows; see docs/data.md


def prepared_split(
    choice: Choice,
    split: str,
    settings: Settings,
    tokenizer,
    loss_takes: Sequence[str],
    cache_dir: str | None,
    silent: bool,
) -> PreparedPrompts:
    """The prompts of a dataset that isn't a named one."""
    source = ROWS[choice.name] if choice.name in ROWS else locate(choice.name)
    own = {key: getattr(choice, key) for key in ("train_split", "test_split", "fields") if getattr(choice, key)}
    both = prepare(choice.name, source, replace(settings, **own), tokenizer, choice.truncation_mode(), loss_takes,
                   cache_dir or get_local_dir([".cache"]), silent)  # fmt: skip
    prompts = both[0 if split == "train" else 1]
    if len(prompts) == 0:
        raise UserError(f"{split_name(choice.name, split)}: no row is left for it; add data, or set test_fraction")
    return prompts
