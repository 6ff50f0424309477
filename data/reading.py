"""The rows of a dataset, read by the `datasets` library: from which files, and what is to be done where it fails.

What is wrong in the files themselves is found out by `data.diagnosis`, what is wrong with the hub by `data.hub`, both
only once the library has failed.
"""

import contextlib
import errno
import glob
import logging
import os
import re
import sys
from typing import TYPE_CHECKING

from basics.files import content_hash
from basics.printing import hides_progress
from data import diagnosis, hub
from utils import UserError, closest_sibling, rank0_print

if TYPE_CHECKING:
    import datasets

FORMATS = "JSON Lines, JSON, CSV, Parquet or Arrow, also compressed"
_SUFFIXES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".zip"]
_MODULES = {  # the library's readers
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SHOWN_FILES = 4


class UnreadableRows(UserError):
    """A file can't be read as rows."""


def _suffix(file: str) -> str:
    """.jsonl of x.jsonl.gz."""
    stem, suffix = os.path.splitext(file.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix


def has_data_suffix(file: str) -> bool:
    """Whether a file's name is that of a file of rows."""
    return _suffix(file) in _SUFFIXES


def check_path(name: str, path: str):
    """Raises UserError if `path`, where the dataset `name` is to be read, is neither a folder nor a hub id."""
    key = f"dataset_paths.{name}={path}"
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
    """One split of the named dataset `name`, from the hub id or folder `path`; says once which files that are.

    Raises: UserError with the file and line that can't be read, or why the hub doesn't give it, and the remedy.
    """
    check_path(name, path)
    path, where = os.path.expanduser(path), f"datasets=[{name}], {split} split"
    files = _split_files(where, path, split) if os.path.isdir(path) else None
    remedy = f"give a local folder of its format: dataset_paths.{name}=DIR"
    return read_rows(where, path, split, files, cache_dir, remedy, silent=silent, label=f"{name} ({split})")


def read_rows(
    where: str,
    path: str,
    split: str,
    files: list[str] | None,
    cache_dir: str | None,
    remedy: str,
    config: str | None = None,
    silent: bool = False,
    label: str = "",
    csv_as_texts: bool = False,
) -> "datasets.Dataset":
    """The rows of a split, memory-mapped.

    Args:
        where: what is read, for messages; label: for the line that says which files that are.
        path: a hub id, or the local folder or file; files: of the split, where the library need not find them.
        remedy: what else can be done if it can't be read.
        config: of a dataset on the hub that has several.
        csv_as_texts: what stands in CSV files is text, also where it looks like a number or like nothing (NA, None).

    Raises: UserError with the file and line that can't be read, or why the hub doesn't give it, and the remedy.
    """
    import datasets  # takes a second: only where rows are read

    # what it logs of a file that it can't read is in its exception, too
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if hides_progress() or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        module, kwargs = path, {}
        if files is not None:
            kwargs = {"data_files": {split.partition("[")[0]: [glob.escape(file) for file in files]}}
            if not os.path.isdir(path):
                module = _MODULES[_suffix(files[0])]
            if _MODULES.get(_suffix(files[0])) == "csv":
                kwargs |= _csv_options(files, csv_as_texts)
            if cache_dir is not None:  # the library knows files again by their times, which tar and rsync restore
                cache_dir = os.path.join(cache_dir, "rows", content_hash(files, cache_dir)[:32])
        builder = datasets.load_dataset_builder(module, name=config, cache_dir=cache_dir, **kwargs)
        files = list((builder.config.data_files or {}).get(split.partition("[")[0], []))
        if not silent:
            rank0_print(f"{label}: reading {_listed(files, path) if files else f'{path} from the cache'}")
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
        rows.data.table.validate(full=True)  # the library doesn't look whether texts are UTF-8
        return rows
    except UserError:
        raise
    except Exception as error:  # the library raises whatever the reader of a format, or the connection, raised
        cause, what_to_do = _cause_and_remedy(error, path, files or [], remedy)
        raise UnreadableRows(f"{where}: {cause}\n{what_to_do}") from error


def _csv_options(files: list[str], as_texts: bool) -> dict:
    """How CSV files are read: what separates their columns, and whether each column is of strings.

    Raises: UserError if the files are separated differently.
    """
    import datasets
    import pandas

    by_delimiter = {diagnosis.csv_delimiter(file, file): file for file in files}
    if len(by_delimiter) > 1:
        shown = " and ".join(f"{file} by {delimiter!r}" for delimiter, file in by_delimiter.items())
        raise UserError(f"columns are separated differently: {shown}\nSeparate them by commas in all files")
    options = {"sep": next(iter(by_delimiter))}
    if as_texts:
        columns = pandas.read_csv(files[0], nrows=0, **options)
        options |= {"features": datasets.Features(dict.fromkeys(columns, datasets.Value("string")))}
        options |= {"keep_default_na": False}
    return options


def split_names(where: str, path: str, config: str | None, cache_dir: str | None, remedy: str) -> list[str]:
    """The splits of a dataset on the hub, or of a folder whose card lists its files.

    Raises: UserError if it can't be told, with cause and remedy.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, name=config, cache_dir=cache_dir)
        return list(builder.config.data_files or builder.info.splits or {})
    except Exception as error:
        cause, what_to_do = _cause_and_remedy(error, path, [], remedy)
        raise UserError(f"{where}: {cause}\n{what_to_do}") from error


def row_place(path: str, split: str, row: int, cache_dir: str | None, files: list[str] | None = None) -> str:
    """' (FILE, line N)' for a row of a split, counted from 0; an empty string where that can't be told."""
    import datasets

    path = os.path.expanduser(path)
    try:
        files = files or (_split_files("", path, split) if os.path.isdir(path) else None)
        if files is None:
            files = (datasets.load_dataset_builder(path, cache_dir=cache_dir).config.data_files or {}).get(split, [])
        place = diagnosis.locate(_local_copies(files), row)
    except Exception:  # this makes a message better, and must not replace it
        return ""
    return f" ({place})" if place else ""


# ---- which files ----------------------------------------------------------------------------------------------------


def folder_files(folder: str, where: str) -> dict[str, list[str]] | None:
    """The files of a folder by their splits, by the name patterns that the library has for folders on the hub, in its
    order, each once, without those of caches and runs; None if the folder's card says which they are.

    Raises: UserError if there are none.
    """
    from datasets.data_files import _get_data_files_patterns, resolve_pattern

    if _card_names_files(folder):
        return None
    folder = os.path.abspath(folder)
    left_out = tuple(f"{directory}/" for directory in caches_and_runs(folder))

    def resolve(pattern: str) -> list[str]:
        files = resolve_pattern(pattern, glob.escape(folder), allowed_extensions=_SUFFIXES)
        kept = [file for file in files if not file.startswith(left_out)]
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
    """The files of a folder that make up a split; None if the folder's card says which they are.

    Raises: UserError if there are none, or if they can't be meant as they are.
    """
    splits = folder_files(folder, where)
    if splits is None:
        return None
    files = splits.get(split, [])
    shown = os.path.abspath(folder)
    if reason := why_not_these(files) if files else _why_no_files(shown, split, sorted(splits)):
        raise UserError(f"{where}: {reason}")
    return files


def why_not_these(files: list[str]) -> str | None:
    """Cause and remedy where the files of a split can't be meant as they are."""
    formats: dict[str, str] = {}
    for file in files:
        if os.path.getsize(file) == 0:
            return f"{file}: the file is empty\nFill it, or remove it"
        formats.setdefault(_MODULES.get(_suffix(file), _suffix(file)), file)
        if (plain := os.path.splitext(file)[0]) in files:
            return f"{file} and {plain} are the same rows twice\nRemove one of them"
    if len(formats) > 1:
        return (
            f"{' and '.join(formats.values())} have different formats\nRemove those that aren't meant, or convert them"
        )
    return None


def _why_no_files(folder: str, split: str, other_splits: list[str]) -> str:
    """Cause and remedy where a folder has no files for a split."""
    entries = sorted(os.listdir(folder))
    remedy = f"Give the split's name to a file or folder there, e.g. {split}.jsonl; formats: {FORMATS}"
    if scripts := [entry for entry in entries if entry.endswith(".py")]:
        return (
            f"{folder} holds no data files but a loading script ({scripts[0]}), and scripts are not run\n"
            f"Write the rows that it yields to {os.path.join(folder, split)}.jsonl; formats: {FORMATS}"
        )
    if not entries:
        return f"{folder} is empty\n{remedy}"
    if other_splits:
        return f"{folder} has files for {', '.join(other_splits)} and none for {split}\n{remedy}"
    return f"{folder} has no data files, but {', '.join(entries[:_SHOWN_FILES])}\n{remedy}"


def _card_names_files(folder: str) -> bool:
    """Whether the dataset card (https://huggingface.co/docs/hub/datasets-manual-configuration) lists the data files."""
    for name in ("README.md", ".huggingface.yaml"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                if re.search(r"^configs:", file.read(), re.MULTILINE):
                    return True
    return False


def caches_and_runs(folder: str) -> list[str]:
    """Directories under `folder` that hold what programs wrote: Arrow caches, models from the hub, runs."""
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
    """The first few of these files, how many more, and where they are."""
    folder = os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path))
    shown = [hub.split_url(f)[2] if hub.is_url(f) else os.path.relpath(f, folder) for f in files]
    more = f" and {len(shown) - _SHOWN_FILES} more" if len(shown) > _SHOWN_FILES else ""
    origin = f"{path} at commit {hub.split_url(files[0])[1][:7]}" if hub.is_url(files[0]) else folder
    return f"{', '.join(shown[:_SHOWN_FILES])}{more} of {origin}"


def _local_copies(files: list[str]) -> list[tuple[str, str]]:
    """Name, as messages show it, and local path of each file that has a local copy."""
    copies = [(file, hub.cached_copy(file) if hub.is_url(file) else file) for file in files]
    return [(name, path) for name, path in copies if path is not None]


# ---- what went wrong ------------------------------------------------------------------------------------------------


def _cause_and_remedy(error: Exception, path: str, files: list[str], instead: str) -> tuple[str, str]:
    """What made the library fail, in one line, and what to do about it, in another."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    no_room = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
    for link in chain:
        if isinstance(link, OSError) and link.errno in no_room:
            return f"can't read {path}: {_one_line(link)}", "Make room or set rights there, or choose other local_dirs"
    is_local = os.path.isdir(path) or (bool(files) and not any(map(hub.is_url, files)))
    fault = diagnosis.first_fault(_local_copies(files))
    if fault is not None and (is_local or files):
        copy = "" if is_local else f"; its copy in the cache is {fault.path}: delete that to have it loaded again"
        return f"{fault.place}: {fault.reason}", f"{fault.remedy}{copy}"
    if not is_local and (explanation := hub.why_not(error, path, "dataset")):
        cause, remedy = explanation
        return f"can't load {path!r}: {cause}", f"{remedy}; or {instead}"
    told = [link for link in chain if str(link) != "An error occurred while generating the dataset"]
    return (
        f"can't load {path!r}: {_one_line((told or chain)[0])}",
        f"Check the path or the connection to the hub, or {instead}",
    )


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:400]
