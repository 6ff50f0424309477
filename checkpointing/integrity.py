"""Directories that appear whole or not at all, and checksums that tell when one of their files has changed."""

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator

from safetensors import SafetensorError

from utils import UserError

CHECKSUMS = "SHA256SUMS"  # `sha256sum -c` reads it
CARD = "README.md"  # people write into it before they upload a checkpoint, so it has no checksum
_CHECKPOINT = r"(?:step-[0-9]+|LATEST|BEST)"  # the names of a run's checkpoints
_INTERRUPTED = re.compile(  # and those that they, or config.yaml, have while they are written, replaced or deleted
    rf"{_CHECKPOINT}\.partial-[0-9a-f]{{8}}|step-[0-9]+\.partial-deleted|config\.yaml\.partial-new"
)


# ---- written whole or not at all ------------------------------------------------------------------------------------


_REMEDY = (
    "earlier checkpoints are as they were. Make room or choose another local_run_dir; keep_checkpoints=N keeps only "
    "the last N, save_optimizer=false leaves the optimizer out"
)


@contextlib.contextmanager
def atomic_directory(path: str, remedy: str = _REMEDY) -> Iterator[str]:
    """Lend an empty directory to be filled; then it appears as `path`, whole and on the disk, instead of an older one.

    `remedy`: what an error tells the user to do.

    Raises: UserError if that can't be; nothing of it remains then, and an older one is as it was.
    """
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    try:
        os.makedirs(partial)
        yield partial
        _write_checksums(partial)
        files = [os.path.join(partial, name) for name in os.listdir(partial)]
        for path_of_file in files:  # safetensors makes its files readable for their owner alone
            os.chmod(path_of_file, os.stat(partial).st_mode & 0o666)
        _flush(*files, partial)
        replace_path(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
        raise UserError(
            f"can't write the checkpoint {path} ({type(cause).__name__}: {str(cause)[:300]}); {remedy}"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(*paths: str):
    """Have files or directories on the disk before anything that is written after them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_path(new: str, path: str):
    """Rename `new` to `path`. An older directory or link there steps aside first; if a crash comes between the two,
    `recover_interrupted_saves` puts it back."""
    older = f"{path}.replaced"
    if os.path.lexists(path):
        os.rename(path, older)
    try:
        os.rename(new, path)
    except OSError:
        if os.path.lexists(older):
            os.rename(older, path)
        raise
    _flush(os.path.dirname(path) or ".")
    _remove(older)


def _remove(path: str):
    if os.path.islink(path) or os.path.isfile(path):
        os.remove(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def is_checkpoint_name(name: str) -> bool:
    """Whether a run gives its checkpoints such names."""
    return re.fullmatch(_CHECKPOINT, name) is not None


def is_run(directory: str) -> bool:
    """Whether a directory is one that a run writes to: with its config.yaml, or one of its checkpoints."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    checkpoints = [name for name in names if is_checkpoint_name(name.removesuffix(".replaced"))]
    return "config.yaml" in names or any(os.path.exists(os.path.join(directory, c, CHECKSUMS)) for c in checkpoints)


def recover_interrupted_saves(run_dir: str):
    """Put right what a crash within a save left: remove what is not whole, put back what had stepped aside.

    Nothing else is touched, and nothing in a directory that isn't a run's.
    """
    for name in os.listdir(run_dir) if is_run(run_dir) else []:
        path = os.path.join(run_dir, name)
        if _INTERRUPTED.fullmatch(name):
            _remove(path)
        elif name.endswith(".replaced") and is_checkpoint_name(name.removesuffix(".replaced")):
            kept = path.removesuffix(".replaced")
            if os.path.lexists(kept):
                _remove(path)
            else:
                os.rename(path, kept)


# ---- checksums ------------------------------------------------------------------------------------------------------


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_checksums(directory: str):
    names = sorted(name for name in os.listdir(directory) if name != CARD)
    lines = [f"{_sha256(os.path.join(directory, name))}  {name}\n" for name in names]
    with open(os.path.join(directory, CHECKSUMS), "w", encoding="utf-8") as file:
        file.writelines(lines)


def read_checksums(directory: str) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, in hexadecimal, as they were when it was written.

    Raises: OSError; ValueError if a line isn't what `sha256sum` writes.
    """
    with open(os.path.join(directory, CHECKSUMS), encoding="utf-8") as file:
        lines = file.read().splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([^/\0]+)", line) for line in lines]
    if None in matches:
        raise ValueError(f"line {matches.index(None) + 1} of {CHECKSUMS} is not a SHA-256 and a file's name")
    return {match[2]: match[1] for match in matches}


def verify_checksum(directory: str, name: str, digest: str | None):
    """Raises ValueError if a file of a checkpoint is not as it was written."""
    if _sha256(os.path.join(directory, name)) != digest:
        raise ValueError(f"{name} is not what {CHECKSUMS} beside it says: the file is damaged")


def find_corruption(directory: str) -> str | None:
    """What is wrong with a checkpoint directory, or None if every file is as it was written."""
    try:
        checksums = read_checksums(directory)
        if "state.json" not in checksums:
            return f"{CHECKSUMS} doesn't list state.json"
        for name, digest in checksums.items():
            verify_checksum(directory, name, digest)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None
