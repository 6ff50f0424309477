"""Read the rows of a dataset with the `datasets` library, and explain its failures.

Once the library has failed, `data.diagnosis` looks for a bad line in the files, and `data.hub` asks the hub.
"""

import contextlib
import errno
import glob
import logging
import os
import re
import sys
from typing import TYPE_CHECKING

from basics.files import HashCache, content_hash, has_no_room
from basics.printing import hides_progress, one_line
from data import arrow_cache, diagnosis, hub
from data.batches import split_name
from data.locations import READERS, Location, locate_built_in
from data.plain_reader import csv_delimiter, file_format
from utils import UserError, rank0_print

if TYPE_CHECKING:
    import datasets

_SHOWN_FILES = 4


class UnreadableRows(UserError):
    """Raised if the library can't read the rows of a split."""


def read_split(name: str, path: str, split: str, cache_dir: str | None, silent: bool = False) -> "datasets.Dataset":
    """Read one split of the built-in dataset `name` from the hub id or folder `path`; see `read_rows`."""
    return read_rows(locate_built_in(name, path, split), split, cache_dir, silent)


def read_rows(location: Location, split: str, cache_dir: str | None, silent: bool = False) -> "datasets.Dataset":
    """Print the files of a split and return its rows, memory-mapped.

    In CSV files of the user's own, every value is a string, even a number, NA or None.

    Args:
        split: a split, or a slice of one, such as train[:80%].

    Raises: UserError that names the unreadable file and line, or says why the hub doesn't give the dataset, with the
        remedy.
    """
    import datasets  # the import takes a second

    _quiet_library(silent)
    path, whole_split, files = location.path, split.partition("[")[0], location.split_files(split)
    try:
        module, folder, kwargs = path, cache_dir, {"name": location.config}
        if files is not None:
            module, kwargs = _reader(path, files, whole_split, csv_as_strings=not location.is_built_in)
            if cache_dir is not None:
                # the library recognizes a file by its time, which a changed file may keep (tar, rsync)
                folder = os.path.join(cache_dir, "rows", content_hash(files, cache_dir)[:32])
        with _checked_cache(cache_dir, folder, path if files is None else None):
            builder = datasets.load_dataset_builder(module, cache_dir=folder, **kwargs)
            files = list((builder.config.data_files or {}).get(whole_split, []))
            if not silent:
                source = _listed(files, path) if files else f"{path} from the cache"
                rank0_print(f"{location.name} ({split}): reading {source}")
            arrow_cache.prepare(builder)
        rows = builder.as_dataset(split=split)
        rows.data.table.validate(full=True)  # the library doesn't check that strings are UTF-8
        return rows
    except UserError:
        raise
    except Exception as error:  # a format's reader or the connection may raise anything
        cause, remedy = _cause_and_remedy(error, location, files or [], cache_dir)
        raise UnreadableRows(f"{split_name(location.name, split)}: {cause}\n{remedy}") from error


def _quiet_library(silent: bool):
    """Turn off the library's log, which only repeats its exceptions, and progress bars that nobody sees."""
    import datasets

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if silent:
        datasets.logging.set_verbosity_error()
    if silent or hides_progress() or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _reader(path: str, files: list[str], split: str, csv_as_strings: bool) -> tuple[str, dict]:
    """Return the library's module that reads a split's files, and its options."""
    options = {"data_files": {split: [glob.escape(file) for file in files]}}
    # for a ZIP archive give its folder: then the library finds the format of the files inside
    module = READERS.get(file_format(files[0]), os.path.dirname(files[0]))
    if module == "csv":
        options |= _csv_options(files, csv_as_strings)
    return path if os.path.isdir(path) else module, options


def _checked_cache(cache_dir: str | None, folder: str | None, name: str | None) -> contextlib.AbstractContextManager:
    """Let `arrow_cache` check the library's files, except in its default cache, which other programs share."""
    if cache_dir is None:
        return contextlib.nullcontext()
    return arrow_cache.checked(folder, name, HashCache(cache_dir).sha256)


def _csv_options(files: list[str], as_strings: bool) -> dict:
    """Return the options for reading CSV files: the delimiter, and the columns' types if all are strings.

    Raises: UserError if the files have different delimiters.
    """
    import datasets
    import pandas

    by_delimiter = {csv_delimiter(file, file): file for file in files}
    if len(by_delimiter) > 1:
        shown = " and ".join(f"{file} by {delimiter!r}" for delimiter, file in by_delimiter.items())
        raise UserError(f"the columns are separated differently: {shown}\nSeparate them by commas in all files")
    options = {"sep": next(iter(by_delimiter))}
    if as_strings:
        columns = pandas.read_csv(files[0], nrows=0, **options)
        options |= {"features": datasets.Features(dict.fromkeys(columns, datasets.Value("string")))}
        options |= {"keep_default_na": False}
    return options


def split_names(location: Location, cache_dir: str | None) -> list[str]:
    """Return the splits of a dataset on the hub, or of a folder whose card lists its files.

    Raises: UserError with cause and remedy if they can't be determined.
    """
    import datasets

    try:
        with _checked_cache(cache_dir, cache_dir, location.path):
            builder = datasets.load_dataset_builder(location.path, name=location.config, cache_dir=cache_dir)
        return list(builder.config.data_files or builder.info.splits or {})
    except UserError:
        raise
    except Exception as error:
        cause, remedy = _cause_and_remedy(error, location, [], cache_dir)
        raise UserError(f"{location.where}: {cause}\n{remedy}") from error


def row_place(location: Location, split: str, row: int, cache_dir: str | None) -> str:
    """Return ' (FILE, line N)' for a row of a split, counted from 0; an empty string if it isn't found."""
    import datasets

    if not re.fullmatch(r"[^\[]+(\[:[^\]]*\])?", split):  # a slice that may begin after the split's first row
        return ""
    try:
        files = location.split_files(split)
        if files is None:
            builder = datasets.load_dataset_builder(location.path, name=location.config, cache_dir=cache_dir)
            files = (builder.config.data_files or {}).get(split.partition("[")[0], [])
        place = diagnosis.place_of_row(_local_copies(files), row)
    except Exception:  # this only adds to another error's message, and must not replace that error
        return ""
    return f" ({place})" if place else ""


# ---- files for messages ---------------------------------------------------------------------------------------------


def _listed(files: list[str], path: str) -> str:
    """Return the names of the first few files, the number of the others, and their folder or hub commit."""
    folder = os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path))
    shown = [hub.split_url(f)[2] if hub.is_url(f) else os.path.relpath(f, folder) for f in files]
    more = f" and {len(shown) - _SHOWN_FILES} more" if len(shown) > _SHOWN_FILES else ""
    origin = f"{path} at commit {hub.split_url(files[0])[1][:7]}" if hub.is_url(files[0]) else folder
    return f"{', '.join(shown[:_SHOWN_FILES])}{more} of {origin}"


def _local_copies(files: list[str]) -> list[tuple[str, str]]:
    """Return the name (for messages) and the local path of each file that has a local copy."""
    copies = [(file, hub.cached_copy(file) if hub.is_url(file) else file) for file in files]
    return [(name, path) for name, path in copies if path is not None]


# ---- failures -------------------------------------------------------------------------------------------------------


def _cause_and_remedy(error: Exception, location: Location, files: list[str], cache_dir: str | None) -> tuple[str, str]:
    """Return why the library failed, and what to do about it, in one line each.

    Args:
        cache_dir: the folder where the library keeps the rows; None: its own cache.
    """
    path = location.path
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        is_refused = isinstance(link, OSError) and link.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        if is_refused or has_no_room(link):
            if has_no_room(link) or _is_inside(link.filename, cache_dir):
                remedy = "Make room there or correct the permissions, or choose other local_dirs"
                return f"can't keep the rows of {path} in {cache_dir or 'the cache'}: {one_line(link)}", remedy
            return f"can't read {path}: {one_line(link)}", "Correct its permissions"
    is_local = os.path.isdir(path) or (bool(files) and not any(map(hub.is_url, files)))
    fault = diagnosis.first_fault(_local_copies(files))
    if fault is not None:
        copy = "" if is_local else f"; its copy in the cache is {fault.path}: delete that to download it again"
        return f"{fault.place}: {fault.reason}", f"{fault.remedy}{copy}"
    if not is_local and (explanation := hub.explain_failure(error, path, "dataset")):
        cause, remedy = explanation
        return f"can't load {path!r}: {cause}", f"{remedy}; or {location.alternative}"
    specific = [link for link in chain if str(link) != "An error occurred while generating the dataset"]
    return (
        f"can't load {path!r}: {one_line((specific or chain)[0])}",
        f"Check the path or the connection to the hub, or {location.alternative}",
    )


def _is_inside(path: str | None, directory: str | None) -> bool:
    if path is None or directory is None:
        return False
    return os.path.abspath(path).startswith(os.path.abspath(directory) + os.sep)
