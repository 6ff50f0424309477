"""Resolve the names in `datasets` that aren't named datasets: files, folders, patterns of files, hub ids."""

import glob
import os
import re
from dataclasses import dataclass

from data import reading
from utils import UserError, closest_sibling

TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")  # the first one that exists is evaluated
_IS_TEST = re.compile(r"(^|[^a-zA-Z])(test|testing|validation|valid|val|dev|eval|evaluation)([^a-zA-Z]|$)")


@dataclass(frozen=True)
class Location:
    """The place of a dataset's rows: a hub id, a folder, or the files of each split."""

    name: str  # as the user wrote it
    path: str  # or hub id
    config: str | None = None  # of a hub dataset that has several
    files: dict[str, list[str]] | None = None  # absolute paths; None: the library finds them

    @property
    def where(self) -> str:
        return f"datasets=[{self.name}]"


def is_location(name: str) -> bool:
    """True if a name looks like a path, a pattern or a hub id, rather than a named dataset."""
    return bool(re.search(r"[/*?.~]", name)) or os.path.exists(name)


def locate(name: str, key: str = "datasets") -> Location:
    """Find the files or the hub id that a name means, without reading them.

    Args:
        key: the config key that holds the name, for messages.

    Raises: UserError if there is neither, with similar names.
    """
    path, where = os.path.expanduser(name), f"datasets=[{name}]" if key == "datasets" else f"{key}={name}"
    if os.path.isdir(path):
        return Location(name, path, files=reading.folder_files(path, where))
    if os.path.isfile(path):
        _check_suffix([path], where)
        return Location(name, path, files={"train": [os.path.abspath(path)]})
    if glob.has_magic(path):
        files = sorted(file for file in _matches(path) if os.path.isfile(file))
        if not files:
            raise UserError(f"{where}: no file matches this pattern (current directory: {os.getcwd()})")
        _check_suffix(files, where)
        splits: dict[str, list[str]] = {}
        for file in files:
            split = "test" if _IS_TEST.search(os.path.basename(file)) else "train"
            splits.setdefault(split, []).append(os.path.abspath(file))
        return Location(name, path, files=splits)
    hub_id, _, config = name.partition(":")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id, re.ASCII) and not reading.has_data_suffix(hub_id):
        return Location(name, hub_id, config or None)
    if os.path.lexists(path):
        what = "a link to nowhere" if os.path.islink(path) else "no regular file"
        raise UserError(f"{where}: {path} is {what}; give a file ({reading.FORMATS}) or a folder")
    raise UserError(
        f"{where}: there is no such file or folder (current directory: {os.getcwd()}).{closest_sibling(path)}\n"
        f"Give a file ({reading.FORMATS}), a folder, a pattern like 'data/*.jsonl', or an id on the hub, OWNER/NAME"
    )


def _matches(pattern: str) -> list[str]:
    """Return the paths that match a pattern; `**` doesn't match those in caches and runs."""
    paths = glob.glob(pattern, recursive=True)
    if "**" not in pattern:
        return paths
    root = os.path.abspath(os.path.dirname(pattern[: re.search(r"[*?[]", pattern).start()]) or ".")
    left_out = tuple(f"{directory}/" for directory in reading.caches_and_runs(root))
    kept = [path for path in paths if not os.path.abspath(path).startswith(left_out)]
    return list({os.path.realpath(path): path for path in reversed(kept)}.values())  # links lead to the same file


def _check_suffix(files: list[str], where: str):
    """Raise UserError if a file isn't one of rows by its name, or files contradict each other."""
    for file in files:
        if not reading.has_data_suffix(file):
            raise UserError(f"{where}: {file} has no suffix of a data file; the formats are {reading.FORMATS}")
    if reason := reading.problem_with_files(files):
        raise UserError(f"{where}: {reason}")


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
