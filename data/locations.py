"""Find the files of a dataset, given as a path, a pattern of files or a hub id."""

import contextlib
import glob
import os
import re
from dataclasses import dataclass

from data.batches import split_name
from data.plain_reader import file_format
from utils import UserError, closest_sibling

FORMATS = "JSON Lines, JSON, CSV, Parquet or Arrow, also compressed"
READERS = {  # the module of the `datasets` library that reads a file, by its suffix
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")  # the first one that exists is evaluated

_SUFFIXES = [*READERS, ".zip"]
_IS_TEST = re.compile(r"(^|[^a-zA-Z])(test|testing|validation|valid|val|dev|eval|evaluation)([^a-zA-Z]|$)")
_SHOWN_FILES = 4


@dataclass(frozen=True)
class Location:
    """The hub id, the folder or the files of a dataset's rows."""

    name: str  # of the dataset, as the user wrote it
    path: str  # a local path or a hub id
    config: str | None = None  # the configuration of a hub dataset that has several
    files: dict[str, list[str]] | None = None  # the absolute paths of each split; None if the library finds the files
    is_built_in: bool = False  # the dataset is in `preference_datasets.DATASETS`

    def split_files(self, split: str) -> list[str] | None:
        """Return the files of a split or of a slice such as train[:80%]; None if the library finds the files."""
        return None if self.files is None else self.files[split.partition("[")[0]]

    @property
    def where(self) -> str:
        return f"datasets=[{self.name}]"

    @property
    def alternative(self) -> str:
        """The remedy if the hub doesn't give the dataset."""
        if self.is_built_in:
            return f"give a local folder of its format: dataset_paths.{self.name}=DIR"
        return "give local files"


def is_location(name: str) -> bool:
    """True if a name looks like a path, a pattern or a hub id, rather than the name of a built-in dataset."""
    return bool(re.search(r"[/*?.~]", name)) or os.path.exists(name)


def locate(name: str, key: str = "datasets") -> Location:
    """Find the files or the hub id that a name means, without reading them.

    Args:
        key: the config key that holds the name, for messages.

    Raises: UserError, which suggests similar names, if there is neither.
    """
    path, where = os.path.expanduser(name), f"datasets=[{name}]" if key == "datasets" else f"{key}={name}"
    if os.path.isdir(path):
        return Location(name, path, files=_folder_files(path, where))
    if os.path.isfile(path):
        _check_files([path], where)
        return Location(name, path, files={"train": [os.path.abspath(path)]})
    if glob.has_magic(path):
        files = sorted(file for file in _matches(path) if os.path.isfile(file))
        if not files:
            raise UserError(f"{where}: no file matches this pattern (current directory: {os.getcwd()})")
        _check_files(files, where)
        splits: dict[str, list[str]] = {}
        for file in files:
            split = "test" if _IS_TEST.search(os.path.basename(file)) else "train"
            splits.setdefault(split, []).append(os.path.abspath(file))
        return Location(name, path, files=splits)
    hub_id, _, config = name.partition(":")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id, re.ASCII) and not has_data_suffix(hub_id):
        return Location(name, hub_id, config or None)
    if os.path.lexists(path):
        kind = "a broken link" if os.path.islink(path) else "not a regular file"
        raise UserError(f"{where}: {path} is {kind}; give a file ({FORMATS}) or a folder")
    raise UserError(
        f"{where}: there is no such file or folder (current directory: {os.getcwd()}).{closest_sibling(path)}\n"
        f"Give a file ({FORMATS}), a folder, a pattern like 'data/*.jsonl', or an id on the hub, OWNER/NAME"
    )


def locate_built_in(name: str, path: str, split: str) -> Location:
    """Find the files of a built-in dataset's split if `path` is a local folder; otherwise it is a hub id.

    Raises: UserError if `path` is neither, or the folder has no files of the split that can be read together.
    """
    check_path(name, path)
    path, where = os.path.expanduser(path), split_name(name, split)
    if not os.path.isdir(path) or (splits := _folder_files(path, where)) is None:
        return Location(name, path, is_built_in=True)
    files = splits.get(split, [])
    reason = find_problem(files) if files else _why_no_files(os.path.abspath(path), split, sorted(splits))
    if reason:
        raise UserError(f"{where}: {reason}")
    return Location(name, path, files={split: files}, is_built_in=True)


def check_path(name: str, path: str):
    """Raise UserError if `path`, the source of the built-in dataset `name`, is neither a folder nor a hub id."""
    key = f"dataset_paths.{name}={path}"
    if path == "":
        raise UserError(f"{key} is empty: give a folder, or leave the key out")
    folder = os.path.expanduser(path)
    if os.path.isfile(folder):
        raise UserError(
            f"{key} is a file\nGive the folder that holds it, and name each file in it after its split, e.g. "
            f"{os.path.join(os.path.dirname(path) or '.', 'train.jsonl')}"
        )
    if not os.path.isdir(folder) and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", path):
        raise UserError(
            f"{key}: there is no such folder.{closest_sibling(folder)}\n"
            f"Give a local folder that exists or the id of a dataset on the hub: dataset_paths.{name}=DIR"
        )


def choose_splits(
    available: list[str], train_split: str | None, test_split: str | None, where: str
) -> tuple[str, str | None]:
    """Choose the splits to train and to evaluate on; None for the latter means that prompts must be held out.

    Raises: UserError if a requested split doesn't exist.
    """
    listed = f"; its splits are {', '.join(available)}" if available else ""
    if train_split is None and "train" not in available and len(available) != 1:
        raise UserError(f"{where}: no split 'train'{listed}\nChoose with train_split=NAME and test_split=NAME")
    train = train_split or ("train" if "train" in available else available[0])
    for key, requested in (("train_split", train_split), ("test_split", test_split)):
        if requested is not None and requested.partition("[")[0] not in available:
            raise UserError(f"{where}: {key}={requested}: it has no such split{listed}")
    if test_split is not None:
        return train, test_split
    trained = train.partition("[")[0]  # the rest of a slice, as in train[:80%], isn't evaluated either
    return train, next((name for name in TEST_SPLITS if name in available and name != trained), None)


# ---- files ----------------------------------------------------------------------------------------------------------


def has_data_suffix(file: str) -> bool:
    """True if a file has the suffix of a data file."""
    return file_format(file) in _SUFFIXES


def _check_files(files: list[str], where: str):
    """Raise UserError if a file lacks a data suffix, or if the files can't be read together."""
    for file in files:
        if not has_data_suffix(file):
            raise UserError(f"{where}: {file} has no suffix of a data file; the formats are {FORMATS}")
    if reason := find_problem(files):
        raise UserError(f"{where}: {reason}")


def find_problem(files: list[str]) -> str | None:
    """Return cause and remedy if files of a split are empty, listed twice or of different formats; otherwise None."""
    formats: dict[str, str] = {}
    for file in files:
        if os.path.getsize(file) == 0:
            return f"{file}: the file is empty\nFill it, or remove it"
        formats.setdefault(READERS.get(file_format(file), file_format(file)), file)
        if (plain := os.path.splitext(file)[0]) in files:
            return f"{file} and {plain} hold the same rows\nRemove one of them"
    if len(formats) > 1:
        return f"{' and '.join(formats.values())} have different formats\nConvert them, or remove one of them"
    return None


def _matches(pattern: str) -> list[str]:
    """Return the paths that match a pattern; `**` doesn't match directories of caches and runs."""
    paths = glob.glob(pattern, recursive=True)
    if "**" not in pattern:
        return paths
    root = os.path.abspath(os.path.dirname(pattern[: re.search(r"[*?[]", pattern).start()]) or ".")
    excluded = tuple(f"{directory}/" for directory in _caches_and_runs(root))
    kept = [path for path in paths if not os.path.abspath(path).startswith(excluded)]
    # keep one path per file: with links, several paths may lead to the same file
    return list({os.path.realpath(path): path for path in reversed(kept)}.values())


# ---- folders --------------------------------------------------------------------------------------------------------


def _folder_files(folder: str, where: str) -> dict[str, list[str]] | None:
    """Return the files of each split in a folder, except in caches and runs; None if the folder's card lists them.

    Splits are recognized by the `datasets` library's file name patterns, tried in the library's order.

    Raises: UserError if there are none.
    """
    from datasets.data_files import _get_data_files_patterns, resolve_pattern

    if _card_names_files(folder):
        return None
    folder = os.path.abspath(folder)
    excluded = tuple(f"{directory}/" for directory in _caches_and_runs(folder))

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
    for split, split_patterns in patterns.items():
        for pattern in split_patterns:
            with contextlib.suppress(FileNotFoundError):
                splits.setdefault(str(split), []).extend(resolve(pattern))
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}


def _why_no_files(folder: str, split: str, other_splits: list[str]) -> str:
    """Return cause and remedy for a folder that has no files of a split."""
    entries = sorted(os.listdir(folder))
    remedy = f"Name a file or folder there after the split, e.g. {split}.jsonl; formats: {FORMATS}"
    if not other_splits and (scripts := [entry for entry in entries if entry.endswith(".py")]):
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


def _caches_and_runs(folder: str) -> list[str]:
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
