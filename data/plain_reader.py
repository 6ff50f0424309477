"""Read JSON, JSON Lines and CSV files line by line, after the `datasets` library has failed to.

Errors name the line: `data.diagnosis` finds the bad line by them. `readable_rows` reads JSON Lines despite bad lines.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from basics.files import LFS_POINTER

WRITE_AGAIN = "Write, copy or download the file again"
ONE_OBJECT = "Correct or remove that line: every line must hold one JSON object"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
_OPENERS = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda path, _: io.BufferedReader(pa.input_stream(path, compression="zstd")),
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPE_NAMES = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}


@dataclass
class Fault:
    """An error in a file: its reason, its remedy and its line (counted from 1), or a place in words."""

    reason: str
    remedy: str
    line: int | str | None = None
    is_certain: bool = True  # False: the line can be read, but differs from earlier ones
    name: str = ""  # the file's name
    path: str = ""  # the path of its local copy

    @property
    def place(self) -> str:
        line = f"line {self.line}" if isinstance(self.line, int) else self.line
        return f"{self.name}, {line}" if line else self.name


class FaultFound(Exception):
    """Raised with a `Fault` by the readers below."""

    def __init__(self, reason: str, remedy: str, line: int | str | None = None):
        self.fault = Fault(reason, remedy, line)


def file_format(name: str) -> str:
    """Return a file's suffix, ignoring a compression suffix: .jsonl for x.jsonl.gz."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in _OPENERS else suffix


# ---- lines ----------------------------------------------------------------------------------------------------------


def _byte_lines(path: str, name: str) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed. Raises: FaultFound if the compressed data is damaged or incomplete."""
    opener, number = _OPENERS.get(os.path.splitext(name.lower())[1], open), 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the last line read, for errors)
                yield line
    except EOFError:
        raise FaultFound("the compressed data ends too early", WRITE_AGAIN, number + 1) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError) as error:
        is_compressed = not isinstance(error, gzip.BadGzipFile) or number > 0
        reason = "the compressed data is damaged" if is_compressed else "it isn't compressed, although its name says so"
        remedy = WRITE_AGAIN if is_compressed else "Compress it, or take the suffix off its name"
        raise FaultFound(f"{reason} ({error})", remedy, number + 1 if number else None) from None


def _text_lines(path: str, name: str) -> Iterator[str]:
    """Yield the lines of a file as strings. Raises: FaultFound as `_decoded` does."""
    return (_decoded(line, number) for number, line in enumerate(_byte_lines(path, name), 1))


def _decoded(line: bytes, number: int) -> str:
    """Decode a line, and drop a byte order mark.

    Raises: FaultFound if it isn't UTF-8, holds NUL bytes, or is the first line of a file that isn't data.
    """
    if number == 1:
        check_is_data(line)
        line = line.removeprefix(b"\xef\xbb\xbf")
    if (position := line.find(b"\0")) >= 0:
        raise FaultFound(f"NUL bytes, starting at byte {position + 1} of the line", WRITE_AGAIN, number)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{line[error.start]:02x} ({error.reason}), byte {error.start + 1} of the line"
        raise FaultFound(reason, "Convert the file, e.g. with iconv -f LATIN1 -t UTF-8", number) from None


def check_is_data(first_line: bytes):
    """Raise FaultFound if a file begins like a Git LFS pointer, UTF-16 or a web page."""
    if first_line.startswith(LFS_POINTER):
        raise FaultFound("it is a Git LFS pointer, not the data", "Get the data: git lfs pull", 1)
    if first_line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FaultFound("it is UTF-16, not UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8", 1)
    if first_line.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise FaultFound("it is a web page, not data", "Download the file itself", 1)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def json_rows(path: str, name: str) -> Iterator[tuple[int, object]]:
    """Yield the line number and the value of each row of JSON Lines or JSON. Raises: FaultFound if it isn't JSON."""
    lines = _text_lines(path, name)
    head = list(itertools.islice(lines, 50))
    if not _is_json_lines(next((line for line in head if line.strip()), "")):
        yield from _multiline_json("".join([*head, *lines]))
        return
    for number, line in enumerate(itertools.chain(head, lines), 1):
        if line.strip():
            yield number, _parse_json(line, number)


def _is_json_lines(first_line: str) -> bool:
    """True if a file with this first line is JSON Lines, perhaps faulty; False if its JSON spans several lines."""
    if first_line.lstrip().startswith("["):
        return False
    try:
        json.loads(first_line)
    except json.JSONDecodeError:
        return not first_line.rstrip().endswith(("{", "[", ",", ":"))
    return True


def _parse_json(line: str, number: int) -> object:
    """Return the value of a line. Raises: FaultFound if it isn't JSON, or an object has a key twice."""
    try:
        return json.loads(line, object_pairs_hook=_object_without_duplicates)
    except json.JSONDecodeError as error:
        around = line[max(0, error.pos - 20) : error.pos + 20].strip()
        is_cut = not line.endswith("\n") and error.pos >= len(line.rstrip()) - 1
        if is_cut or error.msg.startswith("Unterminated"):
            raise FaultFound(f"the line is incomplete: ...{line[-40:].strip()!r}", WRITE_AGAIN, number) from None
        reason = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}: {around!r}"
        if line.lstrip().startswith("{'"):
            reason += ", a Python dict: write rows by json.dumps"
        raise FaultFound(reason, ONE_OBJECT, number) from None
    except ValueError as error:
        raise FaultFound(str(error), ONE_OBJECT, number) from None


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"field {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _multiline_json(text: str) -> Iterator[tuple[int, object]]:
    """Yield the line number and the value of each row, in an array of objects or a sequence of multi-line objects.

    Raises: FaultFound if it isn't JSON, or the array has no end.
    """
    decoder, line, position, is_array = json.JSONDecoder(), 1, 0, text.lstrip().startswith("[")
    between = re.compile(r"\s*[\[,]?\s*" if is_array else r"\s*")
    while True:
        start = between.match(text, position).end()
        line, position = line + text.count("\n", position, start), start
        if position == len(text) and is_array:
            raise FaultFound("the array has no end", WRITE_AGAIN, line)
        if position == len(text) or text[position] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            raise FaultFound(reason, WRITE_AGAIN, error.lineno) from None
        yield line, value
        line, position = line + text.count("\n", position, end), end


def check_object(row: object, line: int):
    """Raise FaultFound unless a row is a JSON object without lone surrogates (halves of characters)."""
    if not isinstance(row, dict):
        raise FaultFound(f"a {json_type(row)} instead of an object: {row!r:.60}", ONE_OBJECT, line)
    for key, value in row.items():
        if half := _lone_surrogate(value):
            reason = f"field {key!r} holds half a character ({half!r}, a lone surrogate): the text was cut within it"
            raise FaultFound(reason, "Remove it, or write the whole character", line)


def _lone_surrogate(value: object) -> str | None:
    """Return the first lone surrogate in a JSON value; None if there is none."""
    if isinstance(value, str):
        match = None if value.isascii() else _SURROGATE.search(value)
        return match[0] if match else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((half for part in parts if (half := _lone_surrogate(part))), None)


def json_type(value: object) -> str:
    """Return the type of a JSON value, for messages."""
    return _TYPE_NAMES.get(type(value), "null")


# ---- JSON Lines with bad lines --------------------------------------------------------------------------------------


def are_json_lines(files: list[tuple[str, str]]) -> bool:
    """True if all files, given by name and local path, are JSON Lines, perhaps with bad lines."""
    for name, path in files:
        if file_format(name) not in JSON_SUFFIXES:
            return False
        try:
            first = next((line for line in _byte_lines(path, name) if line.strip()), b"")
        except (FaultFound, OSError):
            return False
        if not _is_json_lines(first.decode("utf-8", errors="replace")):
            return False
    return True


def readable_rows(files: list[tuple[str, str]]) -> Iterator[tuple[str, dict | Fault]]:
    """Yield the place of each line of JSON Lines files, and its object or the fault in it."""
    for name, path in files:
        try:
            for number, line in enumerate(_byte_lines(path, name), 1):
                if line.strip():
                    yield f"{name}, line {number}", _row_or_fault(line, number)
        except FaultFound as found:  # the rest of the file is unreadable
            yield f"{name}, line {found.fault.line}", found.fault


def _row_or_fault(line: bytes, number: int) -> dict | Fault:
    try:
        row = _parse_json(_decoded(line, number), number)
        check_object(row, number)
    except FaultFound as found:
        return found.fault
    return row


# ---- CSV ------------------------------------------------------------------------------------------------------------


def csv_delimiter(path: str, name: str) -> str:
    """Return the delimiter: in TSV a tab; in CSV a comma or, if the header has no comma, a semicolon or a tab."""
    if file_format(name) == ".tsv":
        return "\t"
    try:
        header = next(_text_lines(path, name), "")
    except (FaultFound, OSError):
        return ","
    n_names = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in ",;\t"}
    return "," if n_names[","] > 1 else max(n_names, key=n_names.get)


def csv_rows(path: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the fields of each record, including the header.

    Raises: FaultFound if a quoted field has no end.
    """
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
        raise FaultFound(f"not CSV: {error}, in the record that starts here", remedy, line) from None
