"""Checkpoint directories that are written whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from basics.checksums import write_checksums
from basics.files import PARTIAL, flush_to_disk
from basics.outputs import is_checkpoint_name, is_own_checkpoint, is_run
from distributed.heartbeat import is_lost_connection
from utils import UserError

CARD = "README.md"  # has no checksum, as people edit it before they upload a checkpoint
# names of files and directories that a killed run, of this or an earlier version, was writing or deleting
_INTERRUPTED = re.compile(
    rf"(?:step-[0-9]+|LATEST|BEST|config\.yaml|curves\.png){PARTIAL}|step-[0-9]+\.partial-deleted"
    r"|config\.yaml\.partial-new"
)
_REMEDY = (
    "earlier checkpoints are unchanged. Make room or choose another local_run_dir; keep_checkpoints=N keeps only "
    "the last N, save_optimizer=false leaves the optimizer out"
)


@contextlib.contextmanager
def atomic_directory(path: str, remedy: str = _REMEDY, known: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield an empty directory that replaces `path`, whole and flushed to disk, on exit.

    Args:
        remedy: the remedy in the error message.
        known: SHA-256 by file name; these files aren't read again. Entries may be added until the block ends.

    Raises: UserError if the directory can't be written; then nothing of it remains, and `path` is unchanged.
    """
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    with write_errors_explained(path, remedy):
        try:
            os.makedirs(partial)
            yield partial
            write_checksums(partial, without=CARD, known=known)
            contents = [*Path(partial).rglob("*")]
            for file in contents:
                if file.is_file():  # safetensors makes its files readable for their owner alone
                    file.chmod(os.stat(partial).st_mode & 0o666)
            flush_to_disk(*map(str, contents), partial)
            replace_path(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def write_errors_explained(path: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn errors that writing a checkpoint raises into a UserError with its path and a remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_lost_connection(error):
            raise
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
        raise UserError(
            f"can't write the checkpoint {path} ({type(cause).__name__}: {str(cause)[:300]}); {remedy}"
        ) from error


def replace_path(new: str, path: str):
    """Rename `new` to `path`; an existing directory or link is moved aside first, and removed afterwards.

    After a crash in between, `recover_interrupted_saves` restores the old one.

    Raises: OSError, also if PATH.replaced exists, or if no run wrote the directory at `path`.
    """
    older, exists = f"{path}.replaced", os.path.lexists(path)
    if exists and os.path.lexists(older):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), older)
    is_empty = os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)
    if exists and not is_empty and not is_own_checkpoint(path):
        raise FileExistsError(errno.EEXIST, "no run wrote it; move it away", path)
    if exists:
        os.rename(path, older)
    try:
        os.rename(new, path)
    except OSError:
        if exists:
            os.rename(older, path)
        raise
    flush_to_disk(os.path.dirname(path) or ".")
    if exists:
        remove_whole(older)


def remove_whole(path: str):
    """Remove a checkpoint, or a link to one, so that it disappears as a whole."""
    unfinished = f"{path.removesuffix('.replaced')}.partial-{uuid.uuid4().hex[:8]}"
    os.rename(path, unfinished)
    _remove(unfinished)


def _remove(path: str):
    if os.path.islink(path) or os.path.isfile(path):
        os.remove(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def recover_interrupted_saves(run_dir: str):
    """Repair a run directory after a crash during a save: remove partial files, put replaced checkpoints back.

    Other files, and directories that aren't a run's, are left untouched.
    """
    for name in os.listdir(run_dir) if is_run(run_dir) else []:
        path = os.path.join(run_dir, name)
        if _INTERRUPTED.fullmatch(name):
            _remove(path)
        elif name.endswith(".replaced") and is_checkpoint_name(name.removesuffix(".replaced")):
            kept = path.removesuffix(".replaced")
            if not os.path.lexists(kept):
                os.rename(path, kept)
            elif is_own_checkpoint(path):
                remove_whole(path)
