"""Open the rows of a dataset, from files, the hub or Python; each split is read in chunks."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from basics.files import content_hash
from data import reading
from data.batches import split_name
from data.choice import Choice
from data.locations import Location, choose_splits, find_problem
from data.plain_reader import Fault, are_json_lines, readable_rows
from utils import UserError, rank0_print

ROWS: dict[str, list[dict]] = {}  # rows given in Python, by their name in `datasets`; see docs/data.md

_SHOWN = 10  # bad rows listed in an error message
_SHOWN_OF_ONE_KIND = 3  # if all bad rows are of one kind


@dataclass
class Rows:
    """The rows of a split, to be read in chunks."""

    where: str  # dataset and split, for errors
    label: str  # dataset and split, for other messages
    split: str
    fingerprint: str
    n_rows: int | None  # None: unknown until all are read
    dataset: object = None  # a dataset of the library, or a list; None: read `files` line by line
    place: Callable[[int], str] | None = None  # returns ' (FILE, line N)' for a row's number
    files: list[tuple[str, str]] = field(default_factory=list)  # name and path
    adds_nulls: bool = False  # the file format gives all objects of a column the same keys, some with null

    def chunks(self, size: int) -> Iterator[list[tuple[int, str, dict | Fault]]]:
        """Yield lists of (number, place or an empty string, row or the fault in its line)."""
        if self.dataset is not None:
            for start in range(0, self.n_rows, size):
                rows = _row_dicts(self.dataset[start : start + size])
                rows = map(_without_added_nulls, rows) if self.adds_nulls else rows
                yield [(number, "", row) for number, row in enumerate(rows, start)]
            return
        rows = ((number, place, row) for number, (place, row) in enumerate(readable_rows(self.files)))
        while chunk := list(itertools.islice(rows, size)):
            yield chunk


def _row_dicts(rows: list[dict] | pa.Table | dict[str, list]) -> list[dict]:
    if isinstance(rows, pa.Table):
        return rows.to_pylist()
    if isinstance(rows, dict):
        return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return rows


def _without_added_nulls(row: dict) -> dict:
    """Drop the keys that hold null from the objects inside a row, but keep the columns that are null."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def open_splits(location: Location, choice: Choice, cache_dir: str, silent: bool) -> dict[str, Rows]:
    """Open the rows to train on ('train') and, if there is an evaluation split, those to evaluate on ('test')."""
    available = list(location.files) if location.files is not None else reading.split_names(location, cache_dir)
    train, test = choose_splits(available, choice.train_split, choice.test_split, location.where)
    splits = {"train": train} | ({"test": test} if test is not None else {})
    return {role: open_rows(location, split, cache_dir, silent) for role, split in splits.items()}


def open_rows(location: Location, split: str, cache_dir: str | None, silent: bool) -> Rows:
    """Open the rows of a split; if the library can't read JSON Lines, they are read line by line.

    Raises: UserError with file, line and remedy if the rows can't be read.
    """
    where, label = split_name(location.name, split), f"{location.name} ({split})"
    files = location.split_files(split)
    if files and (reason := find_problem(files)):
        raise UserError(f"{where}: {reason}")
    try:
        rows = reading.read_rows(location, split, cache_dir, silent)
    except reading.UnreadableRows as error:
        named = [(file, file) for file in files or []]
        if "[" in split or not (named and are_json_lines(named)):
            raise
        rank0_print(f"{label}: reading line by line, because the library failed: {str(error).splitlines()[0]}")
        return Rows(where, label, split, content_hash(files, cache_dir), None, files=named)
    cache_files = [file["filename"] for file in rows.cache_files]

    def place(row: int) -> str:
        return reading.row_place(location, split, row, cache_dir)

    # objects whose fields vary from row to row are stored as JSON, which only the library can decode
    holds_json = "Json(" in str(rows.features)
    dataset = rows if holds_json else rows.with_format("arrow")
    adds_nulls = rows.builder_name not in ("json", "csv")
    fingerprint = content_hash(files or cache_files, cache_dir)
    return Rows(where, label, split, fingerprint, len(rows), dataset, place, adds_nulls=adds_nulls)


def rows_of_list(name: str, rows: list[dict]) -> Rows:
    """Open rows that are given in Python.

    Raises: UserError if they are no list, or a row isn't a dict of JSON values.
    """
    where = f"datasets=[{name}]"
    if not isinstance(rows, list):
        kinds = "list(DATASET) of a Dataset, FRAME.to_dict('records') of a DataFrame"
        raise UserError(f"{where}: ROWS[{name!r}] is a {type(rows).__name__}, expected a list of dicts: {kinds}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {number}: {row!r:.60} isn't a dict of fields")
    try:
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: expected rows of strings, numbers, lists and dicts: {error}") from error
    return Rows(where, name, "train", digest, len(rows), rows)


class BadRows:
    """Collects the rows of a split that can't be used: how many of each kind, and the first few."""

    def __init__(self, rows: Rows):
        self.rows, self.kinds, self.first = rows, Counter(), []
        self.n_read = 0  # rows checked, good or bad
        self.remedy = ""  # for the first bad row
        self.n_identical_pairs = 0  # dropped from rows that keep other pairs

    def add(self, number: int, place: str, kind: str, reason: str, remedy: str = "Correct them"):
        """Count a bad row."""
        self.kinds[kind] += 1
        self.remedy = self.remedy or remedy
        if len(self.first) < _SHOWN:
            self.first.append((number, place, reason))

    @property
    def has_enough(self) -> bool:
        """True once there are as many bad rows as an error message lists."""
        return len(self.first) >= _SHOWN

    def raise_if_any(self):
        """Raise UserError with the first bad rows and the number of each kind, if there are any."""
        if not self.first:
            return
        first = self.first[:_SHOWN_OF_ONE_KIND] if len(self.kinds) == 1 else self.first
        lines = [f"  {self.place(number, place)}: {reason}" for number, place, reason in first]
        total = sum(self.kinds.values())
        if total > len(first):
            share = "all" if total == self.n_read else f"{total:,}"
            counted = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
            lines.append(f"  ... {share} of the first {self.n_read:,} rows ({counted})")
        raise UserError(
            f"{self.rows.where}: rows that can't be used:\n" + "\n".join(lines) + f"\n{self.remedy}, or drop and "
            "count such rows with on_bad_example=skip"
        )

    def place(self, number: int, place: str) -> str:
        """Return the place of a row for messages: `place` if given, or else its number and, if known, file and line."""
        return place or f"row {number}{self.rows.place(number) if self.rows.place else ''}"
