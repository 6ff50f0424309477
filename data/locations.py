"""What a name in `datasets` that isn't a named dataset's means: files, a folder, a pattern of files, or a hub id."""

import glob
import os
import re
from dataclasses import dataclass

from data import reading
from utils import UserError, closest_sibling

TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")  # what evaluation takes, the first that is there
_IS_TEST = re.compile(r"(^|[^a-zA-Z])(test|testing|validation|valid|val|dev|eval|evaluation)([^a-zA-Z]|$)")


@dataclass(frozen=True)
class Location:
    """Where the rows of a dataset are: an id on the hub, a folder, or files by their split."""

    given: str
    path: str
    config: str | None = None  # of a dataset on the hub that has several
    files: dict[str, list[str]] | None = None  # absolute; None: the library finds them

    @property
    def where(self) -> str:
        return f"datasets=[{self.given}]"


def is_location(name: str) -> bool:
    """Whether a name has the form of a path, a pattern or a hub id, rather than that of a named dataset."""
    return bool(re.search(r"[/*?.~]", name)) or os.path.exists(name)


def locate(given: str, key: str = "datasets") -> Location:
    """Which files or which hub id a name means; nothing is read.

    Args:
        key: of the config that gives it, for messages.

    Raises: UserError if it is none of these, naming what is near it.
    """
    path, where = os.path.expanduser(given), f"datasets=[{given}]" if key == "datasets" else f"{key}={given}"
    if os.path.isdir(path):
        return Location(given, path, files=reading.folder_files(path, where))
    if os.path.isfile(path):
        _check_suffix([path], where)
        return Location(given, path, files={"train": [os.path.abspath(path)]})
    if glob.has_magic(path):
        files = sorted(file for file in _matches(path) if os.path.isfile(file))
        if not files:
            raise UserError(f"{where}: no file fits this pattern, seen from {os.getcwd()}")
        _check_suffix(files, where)
        splits: dict[str, list[str]] = {}
        for file in files:
            split = "test" if _IS_TEST.search(os.path.basename(file)) else "train"
            splits.setdefault(split, []).append(os.path.abspath(file))
        return Location(given, path, files=splits)
    hub_id, _, config = given.partition(":")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id, re.ASCII) and not reading.has_data_suffix(hub_id):
        return Location(given, hub_id, config or None)
    raise UserError(
        f"{where}: there is no such file or folder, seen from {os.getcwd()}.{closest_sibling(path)}\n"
        f"Give a file ({reading.FORMATS}), a folder, a pattern like 'data/*.jsonl', or an id on the hub, OWNER/NAME"
    )


def _matches(pattern: str) -> list[str]:
    """The paths that fit a pattern; of one that goes into all folders, without those in caches and runs."""
    paths = glob.glob(pattern, recursive=True)
    if "**" not in pattern:
        return paths
    root = os.path.abspath(os.path.dirname(pattern[: re.search(r"[*?[]", pattern).start()]) or ".")
    left_out = tuple(f"{directory}/" for directory in reading.caches_and_runs(root))
    kept = [path for path in paths if not os.path.abspath(path).startswith(left_out)]
    return list({os.path.realpath(path): path for path in reversed(kept)}.values())  # a link leads to the same file


def _check_suffix(files: list[str], where: str):
    for file in files:
        if not reading.has_data_suffix(file):
            raise UserError(f"{where}: {file} is no file of rows by its name; there are {reading.FORMATS}")
    if reason := reading.why_not_these(files):
        raise UserError(f"{where}: {reason}")


def choose_splits(
    there: list[str], train_split: str | None, test_split: str | None, where: str
) -> tuple[str, str | None]:
    """The splits to train and to evaluate on, of those that are there; None: one is to be held out.

    Raises: UserError if one that was asked for isn't there.
    """
    listed = f"; its splits are {', '.join(there)}" if there else ""
    if train_split is None and "train" not in there and len(there) != 1:
        raise UserError(f"{where}: no split 'train'{listed}\nChoose with train_split=NAME and test_split=NAME")
    train = train_split or ("train" if "train" in there else there[0])
    for key, asked in (("train_split", train_split), ("test_split", test_split)):
        if asked is not None and asked.partition("[")[0] not in there:
            raise UserError(f"{where}: {key}={asked}: it has no such split{listed}")
    if test_split is not None:
        return train, test_split
    used = train.partition("[")[0]  # a slice of a split leaves the rest of it to nobody
    return train, next((name for name in TEST_SPLITS if name in there and name != used), None)
