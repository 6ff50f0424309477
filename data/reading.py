"""Read the rows of a dataset with the `datasets` library: choose the files, and explain failures.

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
from data.plain_reader import csv_delimiter, file_format
from utils import UserError, closest_sibling, rank0_print

if TYPE_CHECKING:
    import datasets

FORMATS = "JSON Lines, JSON, CSV, Parquet or Arrow, also compressed"
_SUFFIXES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".zip"]
_MODULES = {  # the library's readers, by suffix
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_SHOWN_FILES = 4


class UnreadableRows(UserError):
    """Raised if the library can't read the rows of a split."""


def has_data_suffix(file: str) -> bool:
    """True if a file has the suffix of a data file."""
    return file_format(file) in _SUFFIXES


def check_path(name: str, path: str):
    """Raise UserError if `path`, the source of the named dataset `name`, is neither a folder nor a hub id."""
    key = f"dataset_paths.{name}={path}"
    if path == "":
        raise UserError(f"{key} is empty: give a folder, or leave the key out")
    folder = os.path.expanduser(path)
    if os.path.isfile(folder):
        raise UserError(
            f"{key} is a file\nGive the folder that holds it, and each split's name to its files, e.g. "
            f"{os.path.join(os.path.dirname(path) or '.', 'train.jsonl')}"
        )
    if not os.path.isdir(folder) and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", path):
        raise UserError(
            f"{key}: there is no such folder.{closest_sibling(folder)}\n"
            f"Give a local folder that exists or the id of a dataset on the hub: dataset_paths.{name}=DIR"
        )


def read_split(name: str, path: str, split: str, cache_dir: str | None, silent: bool = False) -> "datasets.Dataset":
    """Read one split of the named dataset `name` from the hub id or folder `path`, and print the files once.

    Raises: UserError with the unreadable file and line, or why the hub doesn't give it, and the remedy.
    """
    check_path(name, path)
    path = os.path.expanduser(path)
    files = _split_files(split_name(name, split), path, split) if os.path.isdir(path) else None
    remedy = f"give a local folder of its format: dataset_paths.{name}=DIR"
    return read_rows(name, path, split, files, cache_dir, remedy, silent=silent)


def read_rows(
    name: str,
    path: str,
    split: str,
    files: list[str] | None,
    cache_dir: str | None,
    remedy: str,
    config: str | None = None,
    silent: bool = False,
    csv_as_strings: bool = False,
) -> "datasets.Dataset":
    """Return the rows of a split, memory-mapped.

    Args:
        name: the dataset's name, for messages.
        path: a hub id, or the local folder or file.
        split: a split, or a slice of one, such as train[:80%].
        files: the files of the split; None lets the library find them.
        remedy: an alternative for the user if the split can't be read.
        config: the configuration of a hub dataset that has several.
        csv_as_strings: read every CSV value as a string, including numbers and NA or None.

    Raises: UserError with the unreadable file and line, or why the hub doesn't give it, and the remedy.
    """
    import datasets  # the import takes a second

    _quiet_library(silent)
    whole_split = split.partition("[")[0]
    try:
        module, folder, kwargs = path, cache_dir, {"name": config}
        if files is not None:
            module, kwargs = _reader(path, files, whole_split, csv_as_strings)
            if cache_dir is not None:  # the library identifies files by their times, which tar and rsync restore
                folder = os.path.join(cache_dir, "rows", content_hash(files, cache_dir)[:32])
        with _checked_cache(cache_dir, folder, path if files is None else None):
            builder = datasets.load_dataset_builder(module, cache_dir=folder, **kwargs)
            files = list((builder.config.data_files or {}).get(whole_split, []))
            if not silent:
                rank0_print(f"{name} ({split}): reading {_listed(files, path) if files else f'{path} from the cache'}")
            arrow_cache.prepare(builder)
        rows = builder.as_dataset(split=split)
        rows.data.table.validate(full=True)  # the library doesn't check that strings are UTF-8
        return rows
    except UserError:
        raise
    except Exception as error:  # a format's reader or the connection may raise anything
        cause, remedy = _cause_and_remedy(error, path, files or [], cache_dir, alternative=remedy)
        raise UnreadableRows(f"{split_name(name, split)}: {cause}\n{remedy}") from error


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
    module = _MODULES.get(file_format(files[0]), os.path.dirname(files[0]))  # the library looks into ZIP archives
    if module == "csv":
        options |= _csv_options(files, csv_as_strings)
    return path if os.path.isdir(path) else module, options


def _checked_cache(cache_dir: str | None, folder: str | None, name: str | None) -> contextlib.AbstractContextManager:
    """Check the library's Arrow files, except in its default cache, which other programs share."""
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


def split_names(where: str, path: str, config: str | None, cache_dir: str | None, remedy: str) -> list[str]:
    """Return the splits of a dataset on the hub, or of a folder whose card lists its files.

    Raises: UserError with cause and remedy if they can't be determined.
    """
    import datasets

    try:
        with _checked_cache(cache_dir, cache_dir, path):
            builder = datasets.load_dataset_builder(path, name=config, cache_dir=cache_dir)
        return list(builder.config.data_files or builder.info.splits or {})
    except UserError:
        raise
    except Exception as error:
        cause, remedy = _cause_and_remedy(error, path, [], cache_dir, alternative=remedy)
        raise UserError(f"{where}: {cause}\n{remedy}") from error


def row_place(path: str, split: str, row: int, cache_dir: str | None, files: list[str] | None = None) -> str:
    """Return ' (FILE, line N)' for a row of a split, counted from 0; an empty string if it isn't found."""
    import datasets

    path = os.path.expanduser(path)
    try:
        files = files or (_split_files("", path, split) if os.path.isdir(path) else None)
        if files is None:
            files = (datasets.load_dataset_builder(path, cache_dir=cache_dir).config.data_files or {}).get(split, [])
        place = diagnosis.place_of_row(_local_copies(files), row)
    except Exception:  # this only adds to another error's message, and must not replace that error
        return ""
    return f" ({place})" if place else ""


# ---- which files ----------------------------------------------------------------------------------------------------


def folder_files(folder: str, where: str) -> dict[str, list[str]] | None:
    """Return the files of each split in a folder; None if the folder's card lists them.

    The library's name patterns for hub folders decide, in its order. Each file is listed once; those of caches and runs
    are left out.

    Raises: UserError if there are none.
    """
    from datasets.data_files import _get_data_files_patterns, resolve_pattern

    if _card_names_files(folder):
        return None
    folder = os.path.abspath(folder)
    excluded = tuple(f"{directory}/" for directory in caches_and_runs(folder))

    def resolve(pattern: str) -> list[str]:
        files = resolve_pattern(pattern, glob.escape(folder), allowed_extensions=_SUFFIXES)
        kept = [file for file in files if not file.startswith(excluded)]
        kept = [file for file in kept if not re.match(r"cache-\w+\.arrow", os.path.basename(file))]  # by Dataset.map
        if not kept:
            raise FileNotFoundError(pattern)
        return kept

    try:
        patterns = _get_data_files_patterns(resolve)
    except FileNotFoundError:
        raise UserError(f"{where}: {_why_no_files(folder, 'train', [])}") from None
    splits: dict[str, list[str]] = {}
    for split, of_split in patterns.items():
        for pattern in of_split:
            with contextlib.suppress(FileNotFoundError):
                splits.setdefault(str(split), []).extend(resolve(pattern))
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}


def _split_files(where: str, folder: str, split: str) -> list[str] | None:
    """Return a folder's files of a split; None if the folder's card lists them.

    Raises: UserError if there are none, or if they contradict each other.
    """
    splits = folder_files(folder, where)
    if splits is None:
        return None
    files = splits.get(split, [])
    shown = os.path.abspath(folder)
    if reason := problem_with_files(files) if files else _why_no_files(shown, split, sorted(splits)):
        raise UserError(f"{where}: {reason}")
    return files


def problem_with_files(files: list[str]) -> str | None:
    """Return cause and remedy if files of a split are empty, listed twice or of different formats; otherwise None."""
    formats: dict[str, str] = {}
    for file in files:
        if os.path.getsize(file) == 0:
            return f"{file}: the file is empty\nFill it, or remove it"
        formats.setdefault(_MODULES.get(file_format(file), file_format(file)), file)
        if (plain := os.path.splitext(file)[0]) in files:
            return f"{file} and {plain} hold the same rows\nRemove one of them"
    if len(formats) > 1:
        return f"{' and '.join(formats.values())} have different formats\nConvert them, or remove one of them"
    return None


def _why_no_files(folder: str, split: str, other_splits: list[str]) -> str:
    """Return cause and remedy for a folder that has no files of a split."""
    entries = sorted(os.listdir(folder))
    remedy = f"Name a file or folder there after the split, e.g. {split}.jsonl; formats: {FORMATS}"
    if scripts := [entry for entry in entries if entry.endswith(".py")]:
        return (
            f"{folder} has no data files, only a loading script ({scripts[0]}), which is not run\n"
            f"Write the rows that it yields to {os.path.join(folder, split)}.jsonl; formats: {FORMATS}"
        )
    if not entries:
        return f"{folder} is empty\n{remedy}"
    if other_splits:
        return f"{folder} has files for {', '.join(other_splits)} and none for {split}\n{remedy}"
    return f"{folder} has no data files, but {', '.join(entries[:_SHOWN_FILES])}\n{remedy}"


def _card_names_files(folder: str) -> bool:
    """True if the dataset card (https://huggingface.co/docs/hub/datasets-manual-configuration) lists the data files."""
    for name in ("README.md", ".huggingface.yaml"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                if re.search(r"^configs:", file.read(), re.MULTILINE):
                    return True
    return False


def caches_and_runs(folder: str) -> list[str]:
    """Return directories under `folder` that don't hold the user's data: Arrow caches, models from the hub, runs."""
    found = []
    for directory, subdirectories, files in os.walk(folder, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if not name.startswith((".", "__"))]
        is_run = "config.yaml" in files and ("metrics.jsonl" in files or "LATEST" in subdirectories)
        is_arrow_cache = (
            "dataset_info.json" in files and "state.json" not in files and any(f.endswith(".arrow") for f in files)
        )
        is_hub_cache = "snapshots" in subdirectories and {"blobs", "refs"} & set(subdirectories)
        is_prepared = {"info.json", "train.arrow", "test.arrow"} <= set(files)  # by data.preparation
        is_unfinished = directory.endswith((".incomplete", ".partial"))
        if directory != folder and (is_run or is_arrow_cache or is_hub_cache or is_prepared or is_unfinished):
            found.append(directory)
            subdirectories.clear()
    return found


def _listed(files: list[str], path: str) -> str:
    """Name the first few files, the number of further ones, and their folder or hub commit."""
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


def _cause_and_remedy(
    error: Exception, path: str, files: list[str], cache_dir: str | None, alternative: str
) -> tuple[str, str]:
    """Return why the library failed, and what to do about it, in one line each.

    Args:
        cache_dir: where it keeps the rows; None: in its own cache.
        alternative: another remedy, if the hub is the cause.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        is_refused = isinstance(link, OSError) and link.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        if is_refused or has_no_room(link):
            if has_no_room(link) or _is_inside(link.filename, cache_dir):
                place, remedy = cache_dir or "the cache", "Make room or set rights there, or choose other local_dirs"
                return f"can't keep the rows of {path} in {place}: {one_line(link)}", remedy
            return f"can't read {path}: {one_line(link)}", "Set rights there"
    is_local = os.path.isdir(path) or (bool(files) and not any(map(hub.is_url, files)))
    fault = diagnosis.first_fault(_local_copies(files))
    if fault is not None and (is_local or files):
        copy = "" if is_local else f"; its copy in the cache is {fault.path}: delete that to download it again"
        return f"{fault.place}: {fault.reason}", f"{fault.remedy}{copy}"
    if not is_local and (explanation := hub.explain_failure(error, path, "dataset")):
        cause, remedy = explanation
        return f"can't load {path!r}: {cause}", f"{remedy}; or {alternative}"
    specific = [link for link in chain if str(link) != "An error occurred while generating the dataset"]
    return (
        f"can't load {path!r}: {one_line((specific or chain)[0])}",
        f"Check the path or the connection to the hub, or {alternative}",
    )


def _is_inside(path: str | None, directory: str | None) -> bool:
    if path is None or directory is None:
        return False
    return os.path.abspath(path).startswith(os.path.abspath(directory) + os.sep)
