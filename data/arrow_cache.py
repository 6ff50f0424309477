"""Checksum the Arrow files that the `datasets` library writes, and rebuild them from the rows if they are damaged.

The library checks nothing when it maps them into memory: a truncated file causes an error of any kind or a SIGBUS, and
changed bytes become other data.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from filelock import FileLock

from basics.checksums import find_damage, write_checksums
from basics.outputs import CHECKSUMS
from utils import UserError, rank0_print

if TYPE_CHECKING:
    import datasets


def prepare(builder: "datasets.DatasetBuilder"):
    """Let the library convert the rows, unless it has already, and checksum its files; call this inside `checked`."""
    builder.download_and_prepare()
    if not os.path.exists(os.path.join(builder.cache_dir, CHECKSUMS)):
        write_checksums(builder.cache_dir)


@contextlib.contextmanager
def checked(folder: str, name: str | None, hash_file: Callable[[str], str]) -> Iterator[None]:
    """Remove damaged Arrow files; while the block runs, no other process can write any.

    Args:
        folder: the library's cache directory.
        name: check only the files of this hub id, or of this local folder; None checks the whole cache.

    Raises: UserError if damaged files must be rebuilt from the hub, and it can't be reached.
    """
    os.makedirs(folder, exist_ok=True)
    lock = "rows" if name is None else os.path.basename(name) if os.path.isdir(name) else name.replace("/", "___")
    with FileLock(os.path.join(folder, f"{lock}.lock")):
        for root in [folder] if name is None else _roots(name, folder):
            for directory, _, files in os.walk(root):
                is_finished = CHECKSUMS in files or (name is None and "dataset_info.json" in files)
                if is_finished and (damage := find_damage(directory, ["dataset_info.json"], hash_file)):
                    _remove(directory, damage, name)
        yield


def _roots(name: str, folder: str) -> list[str]:
    """Return the cache's folders that may hold a dataset; the library names them owner___name, in snake case."""

    def plain(text: str) -> str:
        return text.lower().replace("/", "").replace("_", "")

    expected = plain(os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name)
    return [os.path.join(folder, found) for found in os.listdir(folder) if plain(found) == expected]


def _remove(directory: str, damage: str, name: str | None):
    from huggingface_hub import constants

    if name is not None and not os.path.isdir(name) and constants.is_offline_mode():
        raise UserError(
            f"{directory} is damaged ({damage})\nStart once where the hub can be reached, with HF_HUB_OFFLINE unset: "
            "then its rows are read again"
        )
    rank0_print(f"WARNING: {directory} is damaged ({damage}): reading the rows again")
    shutil.rmtree(directory)
