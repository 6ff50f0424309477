"""Refuse outputs that would overwrite files which these commands didn't write.

Our own files are recognized by their content: a run's directory by its config.yaml or its checkpoints, other files by
how they begin.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from basics.errors import UserError
from basics.links import link_target

CHECKSUMS = "SHA256SUMS"  # in every checkpoint; `sha256sum -c` reads it
SHARDS = "shards.json"  # in a sharded checkpoint: which file holds which part of which tensor
MODEL_INDEX = "model.safetensors.index.json"  # for `from_pretrained`: which file holds which tensor
CONFIG_HEADER = b"# SHA-256 of what the run started from"  # the beginning of a run's config.yaml
PICTURE_OF = "direct-preference-optimization"  # in the metadata of each picture that is drawn here

_PICTURE = re.compile(rb"\x89PNG.{,2000}" + PICTURE_OF.encode(), re.DOTALL)
_CHECKPOINT = re.compile(r"step-[0-9]+|LATEST|BEST")
_LOGS = ("config.yaml", "metrics.jsonl", "samples.jsonl", "curves.png")
_HEAD = 2**16  # bytes of a file that are read to recognize it
_LONGEST_NAME = 255 - len(".partial-01234567")  # bytes: file systems allow 255, and unfinished files have this suffix

Refusal = Callable[[str], str | None]  # returns why a path must not be written; None if it may


@dataclass(frozen=True)
class Output:
    """A file or directory that a command is about to write."""

    key: str  # of the config, or the command's option
    path: str
    refusal: Refusal


def check_outputs(outputs: Iterable[Output], inputs: Mapping[str, str | None] | None = None):
    """Refuse outputs that would replace anything that the same command didn't write.

    Args:
        inputs: the files that the command reads, by their keys.

    Raises: UserError naming key, value and remedy, before anything is written.
    """
    taken = {os.path.realpath(path): key for key, path in (inputs or {}).items() if path is not None}
    for output in outputs:
        shown = f"{output.key}={output.path}"
        place = os.path.realpath(output.path)
        if place in taken:
            raise UserError(f"{shown} is also the file of {taken[place]}; give another")
        taken[place] = output.key
        if reason := why_not_writable(os.path.dirname(os.path.abspath(output.path))) or output.refusal(output.path):
            raise UserError(f"{shown}: {reason}")


def why_not_writable(directory: str) -> str | None:
    """Return why a directory can't be written, or created where it doesn't exist yet; None if it can."""
    existing = os.path.abspath(directory)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        number = errno.ENOTDIR
    elif hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY:
        number = errno.EROFS
    elif not os.access(existing, os.W_OK | os.X_OK):
        number = errno.EACCES
    else:
        return None
    return f"can't write there: {OSError(number, os.strerror(number), existing)}; give a directory that can be written"


# ---- files ----------------------------------------------------------------------------------------------------------


def refuse_existing_file(path: str) -> str | None:
    """Refuse a file that exists."""
    exists = "it exists; give another file, or delete it" if os.path.lexists(path) else None
    return _why_not_a_file_path(path) or exists


def refuse_unless_json_lines(contents: str, start: bytes, keys: Iterable[str]) -> Refusal:
    """Return a function that refuses a file whose first line doesn't begin with `start`, or lacks one of the `keys`.

    Args:
        contents: a plural noun for the lines, for messages.
    """
    return _refuse_unless(contents, lambda head: _is_line(head, start, set(keys)))


def refuse_unless_document(contents: str, start: bytes) -> Refusal:
    """Return a function that refuses a file whose beginning doesn't match the regular expression `start`."""
    return _refuse_unless(contents, lambda head: re.match(start, head) is not None)


def refuse_unless_picture(path: str) -> str | None:
    """Refuse a file that isn't a picture drawn by these commands, except the curves.png of a run."""
    is_curves_of_run = os.path.basename(path) == "curves.png" and is_run(os.path.dirname(path) or ".")
    if is_curves_of_run and (os.path.isfile(path) or not os.path.lexists(path)):
        return None
    return _refuse_unless("pictures drawn here", lambda head: _PICTURE.match(head) is not None)(path)


def _refuse_unless(contents: str, is_own: Callable[[bytes], bool]) -> Refusal:
    def refusal(path: str) -> str | None:
        if reason := _why_not_a_file_path(path):
            return reason
        if not os.path.exists(path) or os.path.getsize(path) == 0:
            return None
        try:
            with open(path, "rb") as file:
                head = file.read(_HEAD)
        except OSError as error:
            return f"can't read it: {error}"
        return None if is_own(head) else f"it exists, but doesn't hold {contents}; give another file"

    return refusal


def _is_line(head: bytes, start: bytes, keys: set[str]) -> bool:
    line, has_end, _ = head.partition(b"\n")
    if not has_end:  # longer than the head, or cut off by a crash
        return line.startswith(start) or start.startswith(line)
    try:
        return line.startswith(start) and keys <= json.loads(line).keys()
    except (ValueError, AttributeError, RecursionError):
        return False


def _why_not_a_file_path(path: str) -> str | None:
    """Return why commands must not write a file at a path, even if they wrote it before; None if they may."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        return "there is no such directory; give a file in one that exists"
    if reason := _why_bad_name(path):
        return reason
    if os.path.isdir(path):
        return "it is a directory; give a file"
    if os.path.lexists(path) and not os.path.isfile(path):
        return "it is not a regular file; give another"
    return _why_run_replaces(path)


def _why_bad_name(path: str) -> str | None:
    n_bytes = len(os.fsencode(os.path.basename(os.path.abspath(path))))
    return f"the name has {n_bytes} bytes; give one of at most {_LONGEST_NAME}" if n_bytes > _LONGEST_NAME else None


def _why_run_replaces(path: str) -> str | None:
    """Return why a run would replace a file or directory, or a directory above it; None if no run would."""
    directory, name = os.path.split(os.path.abspath(path))
    with contextlib.suppress(PermissionError):  # the directory can't be listed
        if (name in {*_LOGS, ".lock"} or is_checkpoint_name(name)) and is_run(directory):
            return "the run itself writes this file; give another"
    above = Path(os.path.realpath(directory))
    for place in map(str, (above, *above.parents)):
        # directories further up may have a SHA256SUMS of the user's own
        names = (CHECKSUMS, "state.json") if place != str(above) else (CHECKSUMS,)
        if all(os.path.exists(os.path.join(place, name)) for name in names):
            return f"{place} is a checkpoint's directory, which is replaced as a whole; give a place elsewhere"
    return None


# ---- directories ----------------------------------------------------------------------------------------------------


def refuse_nonempty_directory(path: str) -> str | None:
    """Refuse a directory that holds anything."""
    if reason := _why_bad_name(path):
        return reason
    if os.path.lexists(path) and not os.path.isdir(path):
        return "it is not a directory; give another"
    if os.path.isdir(path) and os.listdir(path):
        return "the directory exists and is not empty; give another"
    return _why_run_replaces(path)


def refuse_unless_new_run(path: str) -> str | None:
    """Refuse a directory for a new run that holds anything under a name that a run writes."""
    if is_run(path):
        return "it holds another run; choose another directory, or resume that run with resume=auto"
    if names := _run_names(path):
        whole = os.path.join(path, names[0])
        return f"{whole} was not written by a run, which would replace it; choose another directory, or move it away"
    return _why_run_replaces(path)


def refuse_unless_resumed_run(path: str) -> str | None:
    """Refuse a directory for a resumed run if the run would replace a file or link there that no run wrote."""
    is_known = is_run(path)
    if not is_known and (reason := _why_run_replaces(path)):
        return reason
    for name in _run_names(path):
        whole = os.path.join(path, name)
        if name not in _LOGS:
            is_own = is_own_checkpoint(whole)
        elif not os.path.isfile(whole):
            return f"{whole} is not a regular file; move it away"
        else:
            is_own = is_known and (name != "config.yaml" or _is_own_config(whole))
        if not is_own:
            return f"{whole} was not written by a run, which would replace it; move it away"
    return None


def _run_names(directory: str) -> list[str]:
    """Return the names in a directory that a run would write, checkpoints first."""
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    checkpoints = [name for name in names if is_checkpoint_name(name.removesuffix(".replaced"))]
    return checkpoints + [name for name in names if name in _LOGS]


def is_checkpoint_name(name: str) -> bool:
    """True for the names of checkpoints: step-N, LATEST and BEST."""
    return _CHECKPOINT.fullmatch(name) is not None


def is_sharded(checkpoint: str) -> bool:
    """True if a checkpoint's tensors are in one file per worker (`checkpointing.sharded`)."""
    return os.path.exists(os.path.join(checkpoint, SHARDS))


def holds_model(checkpoint: str) -> bool:
    """True if a checkpoint has weights for `from_pretrained`; a sharded one has them only at the end of a run."""
    return any(os.path.exists(os.path.join(checkpoint, name)) for name in ("model.safetensors", MODEL_INDEX))


def is_own_checkpoint(path: str) -> bool:
    """True if a path is a checkpoint that a run wrote, even a damaged one, or a link to a checkpoint."""
    if (target := link_target(path)) is not None:
        return is_checkpoint_name(target)
    return any(os.path.isfile(os.path.join(path, name)) for name in (CHECKSUMS, "state.json"))


def _is_own_config(path: str) -> bool:
    """True if a file is the config.yaml of a run, by its header or its keys, or is empty."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return not head or head.startswith(CONFIG_HEADER) or re.search(rb"^local_run_dir:", head, re.MULTILINE) is not None


def is_run(directory: str) -> bool:
    """True if a run wrote to a directory, which then holds its config.yaml or a checkpoint."""
    return _is_own_config(os.path.join(directory, "config.yaml")) or any(
        os.path.exists(os.path.join(directory, name, CHECKSUMS)) for name in _run_names(directory)
    )
