"""What is wrong in a file of rows, and where: a plain reader, for when the library that reads them has failed.

It finds the first line that no reader could take; where there is none, the first that differs from those before it in
its columns or types.
"""

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COPY_AGAIN = "Write, copy or download the file again"
_ONE_OBJECT = "Correct or remove that line: each holds one JSON object"
_CHUNK = 10 << 20  # bytes; from as many the library infers a JSON file's columns
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Fault:
    """Something wrong in a file, at a line (counted from 1) or, where it has no lines, at a place in words."""

    reason: str
    remedy: str
    line: int | str | None = None
    is_certain: bool = True  # no reader takes it; otherwise it only differs from what came before
    name: str = ""  # the file's
    path: str = ""  # of its local copy

    @property
    def place(self) -> str:
        line = f"line {self.line}" if isinstance(self.line, int) else self.line
        return f"{self.name}, {line}" if line else self.name


class _Found(Exception):
    def __init__(self, *args, **kwargs):
        self.fault = Fault(*args, **kwargs)


def first_fault(files: list[tuple[str, str]]) -> Fault | None:
    """The first fault in these files, given by name and local path; what is certain goes before what only differs."""
    columns: dict[str, str] = {}
    uncertain = None
    for name, path in files:
        for fault in _faults(path, name, columns):
            fault.name, fault.path = name, path
            if fault.is_certain:
                return fault
            uncertain = uncertain or fault
    return uncertain


def locate(files: list[tuple[str, str]], row: int) -> str | None:
    """'FILE, line N' of a row counted from 0 through all files; None if they have no such row."""
    for name, path in files:
        for place in _row_places(path, name):
            if row == 0:
                return f"{name}, {place}"
            row -= 1
    return None


def _format(name: str) -> str:
    """.jsonl of x.jsonl.gz."""
    stem, suffix = os.path.splitext(name)
    return (os.path.splitext(stem)[1] if suffix in _OPENERS else suffix).lower()


def _lines(path: str, name: str) -> Iterator[bytes]:
    """The file's lines, decompressed. Raises: _Found if it breaks off or isn't what its name says."""
    opener, number = _OPENERS.get(os.path.splitext(name)[1], open), 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (where it broke off)
                yield line
    except EOFError:
        raise _Found("the compressed data breaks off here", _COPY_AGAIN, number + 1) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError) as error:
        is_whole = not isinstance(error, gzip.BadGzipFile) or number > 0
        reason = "the compressed data is damaged" if is_whole else "it isn't compressed, as its name says it is"
        remedy = _COPY_AGAIN if is_whole else "Compress it, or take the suffix off its name"
        raise _Found(f"{reason} ({error})", remedy, number + 1 if number else None) from None


def _faults(path: str, name: str, columns: dict[str, str]) -> Iterator[Fault]:
    """All faults of a file. `columns`: type of each column in the files before; this file's are added."""
    try:
        if os.path.getsize(path) == 0:
            yield Fault("the file is empty", "Fill it, or remove it")
        elif _format(name) in (".jsonl", ".json", ".ndjson"):
            yield from _json_faults(path, name, columns)
        elif _format(name) in (".csv", ".tsv"):
            yield from _csv_faults(path, name, columns)
        elif _format(name) == ".parquet":
            yield from _parquet_faults(path, columns)
        elif _format(name) == ".zip" and not zipfile.is_zipfile(path):
            yield Fault("it is no ZIP archive, or a damaged one", _COPY_AGAIN)
    except _Found as found:
        yield found.fault
    except OSError as error:
        yield Fault(f"can't be read: {error.strerror}", "Set the rights to read it")


# ---- text -----------------------------------------------------------------------------------------------------------


def _text_lines(path: str, name: str) -> Iterator[str]:
    """The file's lines as text, without byte order mark. Raises: _Found if a line is no UTF-8, or holds NUL bytes."""
    for number, line in enumerate(_lines(path, name), 1):
        if number == 1:
            _check_is_data(line)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if (position := line.find(b"\0")) >= 0:
            raise _Found(f"NUL bytes, from byte {position + 1} of the line on", _COPY_AGAIN, number)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = (
                f"no valid UTF-8: byte 0x{line[error.start]:02x} ({error.reason}), byte {error.start + 1} of the line"
            )
            raise _Found(reason, "Convert the file, e.g. with iconv -f LATIN1 -t UTF-8", number) from None


def _check_is_data(first_line: bytes):
    """Raises: _Found if the file is one of those that come in a data file's place."""
    if first_line.startswith(b"version https://git-lfs"):
        raise _Found("it is a Git LFS pointer, not the data", "Get the data: git lfs pull", 1)
    if first_line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Found("it is UTF-16, not UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8", 1)
    if first_line.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise _Found("it is a web page, not data", "Download the file itself", 1)


def _json_rows(path: str, name: str) -> Iterator[tuple[int, object]]:
    """Line and value of each row. JSON Lines are read line by line, other JSON as a whole.

    Raises: _Found where it is no JSON.
    """
    lines = _text_lines(path, name)
    head = list(itertools.islice(lines, 50))
    if not _is_line_by_line(next((line for line in head if line.strip()), "")):
        yield from _whole_json("".join([*head, *lines]))
        return
    for number, line in enumerate(itertools.chain(head, lines), 1):
        if line.strip():
            yield number, _parsed(line, number)


def _is_line_by_line(first_line: str) -> bool:
    """Whether a file that begins so is JSON Lines, if perhaps faulty, and no JSON that goes on over several lines."""
    if first_line.lstrip().startswith("["):
        return False
    try:
        json.loads(first_line)
    except json.JSONDecodeError:
        return not first_line.rstrip().endswith(("{", "[", ",", ":"))
    return True


def _parsed(line: str, number: int) -> object:
    """Raises: _Found if the line is no JSON."""
    try:
        return json.loads(line, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        around = line[max(0, error.pos - 20) : error.pos + 20].strip()
        is_cut = not line.endswith("\n") and error.pos >= len(line.rstrip()) - 1
        if is_cut or error.msg.startswith("Unterminated"):
            raise _Found(f"breaks off in the middle: ...{line[-40:].strip()!r}", _COPY_AGAIN, number) from None
        reason = f"no JSON: {error.msg.removesuffix(' at')} at column {error.colno}: {around!r}"
        raise _Found(reason, _ONE_OBJECT, number) from None
    except ValueError as error:
        raise _Found(str(error), _ONE_OBJECT, number) from None


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the field {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return values


def _whole_json(text: str) -> Iterator[tuple[int, object]]:
    """The rows of an array of objects, or of objects that follow each other over several lines.

    Raises: _Found where it is no JSON, or the array doesn't end.
    """
    decoder, line, position, is_array = json.JSONDecoder(), 1, 0, text.lstrip().startswith("[")
    between = re.compile(r"\s*[\[,]?\s*" if is_array else r"\s*")
    while True:
        start = between.match(text, position).end()
        line, position = line + text.count("\n", position, start), start
        if position == len(text) and is_array:
            raise _Found("breaks off in the middle of its array", _COPY_AGAIN, line)
        if position == len(text) or text[position] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"no JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            raise _Found(reason, _COPY_AGAIN, error.lineno) from None
        yield line, value
        line, position = line + text.count("\n", position, end), end


def _json_faults(path: str, name: str, columns: dict[str, str]) -> Iterator[Fault]:
    n_rows, n_characters, is_first_file = 0, 0, not columns
    for line, row in _json_rows(path, name):
        n_rows += 1
        if row is not None and not isinstance(row, dict):
            yield Fault(f"a {_kind(row)} instead of an object: {row!r:.60}", _ONE_OBJECT, line)
            return
        for key, value in (row or {}).items():
            if half := _half_character(value):
                yield Fault(
                    f"field {key!r} holds half a character ({half!r}, a lone surrogate): the text was cut within it",
                    "Remove it, or write the whole character",
                    line,
                )
                return
            n_characters += len(value) if isinstance(value, str) else 0
            is_known = key in columns or (is_first_file and n_characters < _CHUNK)
            kind_before = columns.setdefault(key, "null")
            if not is_known:
                reason = (
                    f"a column {key!r} that the rows before it don't have; they have {sorted(set(columns) - {key})}"
                )
                yield Fault(reason, "Give all rows of a split the same columns", line, is_certain=False)
            elif value is not None and kind_before not in ("null", _kind(value)):
                reason = f"field {key!r} is a {_kind(value)}, in rows before it a {kind_before}: {value!r:.60}"
                yield Fault(reason, "Give a field the same type in all rows", line, is_certain=False)
            if kind_before == "null":
                columns[key] = _kind(value)
    if n_rows == 0:
        yield Fault("the file has no rows", "Fill it, or remove it")


def _half_character(value: object) -> str | None:
    """A lone surrogate somewhere in a JSON value."""
    if isinstance(value, str):
        match = None if value.isascii() else _SURROGATE.search(value)
        return match[0] if match else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((half for part in parts if (half := _half_character(part))), None)


def _kind(value: object) -> str:
    names = {str: "text", bool: "truth value", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "null")


def csv_delimiter(path: str, name: str) -> str:
    """Return what separates the columns of a file: a tab in TSV, a comma in CSV, or a semicolon or tab where its header
    has several names only so."""
    if _format(name) == ".tsv":
        return "\t"
    try:
        header = next(_text_lines(path, name), "")
    except (_Found, OSError):
        return ","
    n_names = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in ",;\t"}
    return "," if n_names[","] > 1 else max(n_names, key=n_names.get)


def _csv_rows(path: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """First line and fields of each record, the header too. Raises: _Found if a quoted field never ends."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_text_lines(path, name), strict=True, delimiter=csv_delimiter(path, name))
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        remedy = 'Put the field in quotes and double each quote in it (""), or close the quote'
        raise _Found(f"no CSV: {error}, in the record that starts here", remedy, line) from None


def _csv_faults(path: str, name: str, columns: dict[str, str]) -> Iterator[Fault]:
    header = None
    for line, record in _csv_rows(path, name):
        if header is None:
            header = record
            if columns and set(header) != set(columns):
                yield Fault(
                    f"the columns {header}, in the files before it {sorted(columns)}",
                    "Give all files of a split the same columns",
                    line,
                    is_certain=False,
                )
            columns.update(dict.fromkeys(header, "text"))
        elif len(record) > len(header):
            yield Fault(
                f"{len(record)} fields, the header has {len(header)}",
                'Put fields that hold a comma in quotes, and double each quote in them ("")',
                line,
            )
            return
    if header is None:
        yield Fault("the file has no rows", "Fill it, or remove it")


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _parquet_faults(path: str, columns: dict[str, str]) -> Iterator[Fault]:
    import pyarrow
    import pyarrow.parquet

    first_row, place = 0, None
    try:
        with open(path, "rb") as file:  # so that a folder's name can't be taken for a partition's
            _check_is_data(file.read(64))
            parquet = pyarrow.parquet.ParquetFile(file)
            kinds = {field.name: str(field.type) for field in parquet.schema_arrow}
            if columns and kinds != columns:
                yield Fault(
                    f"the columns {kinds}, in the files before it {columns}",
                    "Give all files of a split the same columns and types",
                    is_certain=False,
                )
            columns.update(kinds)
            for group in range(parquet.num_row_groups):
                n_rows = parquet.metadata.row_group(group).num_rows
                place = f"rows {first_row} to {first_row + n_rows - 1} (row group {group})"
                parquet.read_row_group(group)
                first_row += n_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield Fault(f"damaged: {' '.join(str(error).split())[:200]}", _COPY_AGAIN, place)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _row_places(path: str, name: str) -> Iterator[str]:
    """Where each row is, in words."""
    if _format(name) in (".csv", ".tsv"):
        return (f"line {line}" for line, _ in itertools.islice(_csv_rows(path, name), 1, None))
    if _format(name) == ".parquet":
        import pyarrow.parquet

        return (f"row {row}" for row in range(pyarrow.parquet.ParquetFile(path).metadata.num_rows))
    if _format(name) in (".jsonl", ".json", ".ndjson"):
        return (f"line {line}" for line, _ in _json_rows(path, name))
    raise ValueError(name)


# ---- all that can be read -------------------------------------------------------------------------------------------


def are_json_lines(files: list[tuple[str, str]]) -> bool:
    """Whether these files, given by name and local path, can be read line by line where some lines are faulty."""
    for name, path in files:
        if _format(name) not in (".jsonl", ".json", ".ndjson"):
            return False
        try:
            head = b"".join(itertools.islice(_lines(path, name), 1))
        except (_Found, OSError):
            return False
        if not _is_line_by_line(head.decode("utf-8", errors="replace")):
            return False
    return True


def readable_rows(files: list[tuple[str, str]]) -> Iterator[tuple[str, dict | Fault]]:
    """The place of each line of JSON Lines, and its object or what is wrong with it; see `are_json_lines`."""
    for name, path in files:
        try:
            for number, line in enumerate(_lines(path, name), 1):
                if line.strip():
                    yield f"{name}, line {number}", _row_or_fault(line, number)
        except _Found as found:  # nothing can be read behind that
            yield f"{name}, line {found.fault.line}", found.fault


def _row_or_fault(line: bytes, number: int) -> dict | Fault:
    try:
        if b"\0" in line:
            return Fault("NUL bytes", _COPY_AGAIN, number)
        row = _parsed(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"), number)
    except UnicodeDecodeError as error:
        return Fault(f"no valid UTF-8: byte 0x{line[error.start]:02x} ({error.reason})", _COPY_AGAIN, number)
    except _Found as found:
        return found.fault
    if not isinstance(row, dict):
        return Fault(f"a {_kind(row)} instead of an object: {row!r:.60}", _ONE_OBJECT, number)
    if half := _half_character(row):
        return Fault(f"half a character ({half!r}, a lone surrogate)", "Remove it", number)
    return row
