"""Find the bad line after the `datasets` library failed to load a file.

The bad line is the first one that can't be read or, if all lines can be read, the first one whose columns or types
differ from those of earlier lines.
"""

import itertools
import os
import zipfile
from collections.abc import Iterator

from basics.printing import one_line
from data.plain_reader import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    WRITE_AGAIN,
    Fault,
    FaultFound,
    check_is_data,
    check_object,
    csv_rows,
    file_format,
    json_rows,
    json_type,
)

_FILL_IT = "Fill it, or remove it"
_INFERENCE_CHUNK = 10 << 20  # bytes; the library infers the columns of a JSON file from its first chunk of this size


def first_fault(files: list[tuple[str, str]]) -> Fault | None:
    """Return the first line that can't be read, or else the first one that differs from earlier lines.

    Args:
        files: the name (for messages) and the local path of each file.
    """
    columns: dict[str, str] = {}
    difference = None
    for name, path in files:
        for fault in _faults(path, name, columns):
            fault.name, fault.path = name, path
            if fault.is_certain:
                return fault
            difference = difference or fault
    return difference


def _faults(path: str, name: str, columns: dict[str, str]) -> Iterator[Fault]:
    """Yield the faults of a file.

    Args:
        columns: the type of each column in earlier files; this file's columns are added.
    """
    try:
        if os.path.getsize(path) == 0:
            yield Fault("the file is empty", _FILL_IT)
        elif file_format(name) in JSON_SUFFIXES:
            yield from _json_faults(path, name, columns)
        elif file_format(name) in CSV_SUFFIXES:
            yield from _csv_faults(path, name, columns)
        elif file_format(name) == ".parquet":
            yield from _parquet_faults(path, columns)
        elif file_format(name) == ".zip" and not zipfile.is_zipfile(path):
            yield Fault("the file isn't a ZIP archive, or is damaged", WRITE_AGAIN)
    except FaultFound as found:
        yield found.fault
    except OSError as error:
        yield Fault(f"can't be read: {error.strerror}", "Give yourself permission to read it")


def _json_faults(path: str, name: str, columns: dict[str, str]) -> Iterator[Fault]:
    n_rows, n_characters, is_first_file = 0, 0, not columns
    for line, row in json_rows(path, name):
        n_rows += 1
        row = {} if row is None else row
        check_object(row, line)
        for key, value in row.items():
            n_characters += len(value) if isinstance(value, str) else 0
            may_be_new = is_first_file and n_characters < _INFERENCE_CHUNK
            if fault := _column_fault(key, value, columns, may_be_new):
                fault.line = line
                yield fault
    if n_rows == 0:
        yield Fault("the file has no rows", _FILL_IT)


def _column_fault(key: str, value: object, columns: dict[str, str], may_be_new: bool) -> Fault | None:
    """Compare a value with its column's type so far, and record its type if there is none.

    Args:
        may_be_new: accept a column that earlier rows don't have.
    """
    is_known, known_type = key in columns, columns.setdefault(key, "null")
    if known_type == "null":
        columns[key] = json_type(value)
    if not is_known and not may_be_new:
        reason = f"a column {key!r} that earlier rows don't have; they have {sorted(set(columns) - {key})}"
        return Fault(reason, "Give all rows of a split the same columns", is_certain=False)
    if value is not None and known_type not in ("null", json_type(value)):
        reason = f"field {key!r} is a {json_type(value)}, in earlier rows a {known_type}: {value!r:.60}"
        return Fault(reason, "Give a field the same type in all rows", is_certain=False)
    return None


def _csv_faults(path: str, name: str, columns: dict[str, str]) -> Iterator[Fault]:
    header = None
    for line, record in csv_rows(path, name):
        if header is None:
            header = record
            if columns and set(header) != set(columns):
                yield Fault(
                    f"the columns are {header}, in earlier files {sorted(columns)}",
                    "Give all files of a split the same columns",
                    line,
                    is_certain=False,
                )
            columns.update(dict.fromkeys(header, "string"))
        elif len(record) > len(header):
            yield Fault(
                f"{len(record)} fields, but the header has {len(header)}",
                'Put fields that hold a comma in quotes, and double each quote in them ("")',
                line,
            )
            return
    if header is None:
        yield Fault("the file has no rows", _FILL_IT)


def _parquet_faults(path: str, columns: dict[str, str]) -> Iterator[Fault]:
    import pyarrow
    import pyarrow.parquet

    first_row, place = 0, None
    try:
        with open(path, "rb") as file:  # given a path, pyarrow would interpret a folder name like a=b as a partition
            check_is_data(file.read(64))
            parquet = pyarrow.parquet.ParquetFile(file)
            types = {field.name: str(field.type) for field in parquet.schema_arrow}
            if columns and types != columns:
                yield Fault(
                    f"the columns are {types}, in earlier files {columns}",
                    "Give all files of a split the same columns and types",
                    is_certain=False,
                )
            columns.update(types)
            for group in range(parquet.num_row_groups):
                n_rows = parquet.metadata.row_group(group).num_rows
                place = f"rows {first_row} to {first_row + n_rows - 1} (row group {group})"
                parquet.read_row_group(group)
                first_row += n_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield Fault(f"damaged: {one_line(error)}", WRITE_AGAIN, place)


def place_of_row(files: list[tuple[str, str]], row: int) -> str | None:
    """Return the file and line (in Parquet: the file's row) of a row, counted from 0 through all files.

    Args:
        files: the name (for messages) and the local path of each file.

    Returns: None if the files have fewer rows.
    """
    for name, path in files:
        for place in _row_places(path, name):
            if row == 0:
                return f"{name}, {place}"
            row -= 1
    return None


def _row_places(path: str, name: str) -> Iterator[str]:
    """Return the place of each row of a file: 'line N', or 'row N' of Parquet."""
    if file_format(name) in CSV_SUFFIXES:
        return (f"line {line}" for line, _ in itertools.islice(csv_rows(path, name), 1, None))
    if file_format(name) == ".parquet":
        import pyarrow.parquet

        return (f"row {row}" for row in range(pyarrow.parquet.ParquetFile(path).metadata.num_rows))
    if file_format(name) in JSON_SUFFIXES:
        return (f"line {line}" for line, _ in json_rows(path, name))
    raise ValueError(name)
