"""`check_outputs` refuses outputs that would overwrite files which these commands didn't write.

A file that a command overwrites or appends to must be recognizable: a run's directory by its config.yaml or its
checkpoints, other files by how their content begins.
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
_HEAD = 2**16  # bytes by which a file is recognized
_LONGEST_NAME = 255 - len(".partial-01234567")  # bytes: what file systems take, less what unfinished files add

Refusal = Callable[[str], str | None]  # returns why a path must not be written, or None


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
        reason = why_not_writable(os.path.dirname(os.path.abspath(output.path)))
        if reason := reason or output.refusal(output.path):
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


def new_file(path: str) -> str | None:
    """Refuse a file that exists."""
    return _why_no_file(path) or ("it exists; give another file, or delete it" if os.path.lexists(path) else None)


def json_lines(what: str, start: bytes, keys: Iterable[str]) -> Refusal:
    """Return a function that refuses a file whose first line doesn't begin with `start` and hold `keys`."""
    return _own_file(what, lambda head: _is_line(head, start, set(keys)))


def document(what: str, start: bytes) -> Refusal:
    """Return a function that refuses a file whose beginning doesn't match the regular expression `start`."""
    return _own_file(what, lambda head: re.match(start, head) is not None)


def picture(path: str) -> str | None:
    """Refuse a file that isn't a picture drawn here; a run directory's curves.png is one."""
    is_runs = os.path.basename(path) == "curves.png" and is_run(os.path.dirname(path) or ".")
    if is_runs and (os.path.isfile(path) or not os.path.lexists(path)):
        return None
    return _own_file("pictures drawn here", lambda head: _PICTURE.match(head) is not None)(path)


def _own_file(what: str, is_own: Callable[[bytes], bool]) -> Refusal:
    def refusal(path: str) -> str | None:
        if reason := _why_no_file(path):
            return reason
        if not os.path.exists(path) or os.path.getsize(path) == 0:
            return None
        try:
            with open(path, "rb") as file:
                head = file.read(_HEAD)
        except OSError as error:
            return f"can't read it: {error}"
        return None if is_own(head) else f"it exists, but doesn't hold {what}; give another file"

    return refusal


def _is_line(head: bytes, start: bytes, keys: set[str]) -> bool:
    line, has_end, _ = head.partition(b"\n")
    if not has_end:  # longer than the head, or cut off by a crash
        return line.startswith(start) or start.startswith(line)
    try:
        return line.startswith(start) and keys <= json.loads(line).keys()
    except (ValueError, AttributeError, RecursionError):
        return False


def _why_no_file(path: str) -> str | None:
    """Return why no command may write a file here, whatever it holds."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        return "there is no such directory; give a file in one that exists"
    if reason := _why_bad_name(path):
        return reason
    if os.path.isdir(path):
        return "it is a directory; give a file"
    if os.path.lexists(path) and not os.path.isfile(path):
        return "it is no regular file; give another"
    return _why_runs_own(path)


def _why_bad_name(path: str) -> str | None:
    n_bytes = len(os.fsencode(os.path.basename(os.path.abspath(path))))
    return f"the name has {n_bytes} bytes; give one of at most {_LONGEST_NAME}" if n_bytes > _LONGEST_NAME else None


def _why_runs_own(path: str) -> str | None:
    """Return why a run would replace this file or directory, or one that it is in; None if none would."""
    directory, name = os.path.split(os.path.abspath(path))
    with contextlib.suppress(PermissionError):  # it can't be listed
        if (name in {*_LOGS, ".lock"} or is_checkpoint_name(name)) and is_run(directory):
            return "the run writes that itself; give another"
    above = Path(os.path.realpath(directory))
    for place in map(str, (above, *above.parents)):
        # further up, SHA256SUMS alone may be the user's
        names = (CHECKSUMS, "state.json") if place != str(above) else (CHECKSUMS,)
        if all(os.path.exists(os.path.join(place, name)) for name in names):
            return f"{place} is a checkpoint's directory, which is replaced as a whole; give a place elsewhere"
    return None


# ---- directories ----------------------------------------------------------------------------------------------------


def new_directory(path: str) -> str | None:
    """Refuse a directory that holds anything."""
    if reason := _why_bad_name(path):
        return reason
    if os.path.lexists(path) and not os.path.isdir(path):
        return "it is no directory; give another"
    if os.path.isdir(path) and os.listdir(path):
        return "the directory exists and is not empty; give another"
    return _why_runs_own(path)


def new_run(path: str) -> str | None:
    """Refuse a directory that holds anything under a name that a run writes."""
    if os.path.isdir(path) and is_run(path):
        return "it holds another run; choose another directory, or resume that run with resume=auto"
    if names := _run_names(path):
        whole = os.path.join(path, names[0])
        return f"{whole} is not a run's, and a run would replace it; choose another directory, or move it away"
    return _why_runs_own(path)


def resumed_run(path: str) -> str | None:
    """Refuse a directory with a file or link that the run would replace, unless a run wrote it."""
    is_known = os.path.isdir(path) and is_run(path)
    if not is_known and (reason := _why_runs_own(path)):
        return reason
    for name in _run_names(path):
        whole = os.path.join(path, name)
        if name not in _LOGS:
            is_own = is_own_checkpoint(whole)
        elif not os.path.isfile(whole):
            return f"{whole} is not a regular file; move it away"
        else:
            is_own = is_known and (name != "config.yaml" or is_own_config(whole))
        if not is_own:
            return f"{whole} is not a run's, and the run would replace it; move it away"
    return None


def _run_names(directory: str) -> list[str]:
    """Return the names in a directory that a run writes, those of checkpoints first."""
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
    """True if a run wrote this directory, which may be damaged, or this link to one."""
    if (target := link_target(path)) is not None:
        return is_checkpoint_name(target)
    return any(os.path.isfile(os.path.join(path, name)) for name in (CHECKSUMS, "state.json"))


def is_own_config(path: str) -> bool:
    """True if a file is a run's config.yaml, by its header or its keys, or if it is empty."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return not head or head.startswith(CONFIG_HEADER) or re.search(rb"^local_run_dir:", head, re.MULTILINE) is not None


def is_run(directory: str) -> bool:
    """True if a run wrote to this directory: it has the run's config.yaml, or one of its checkpoints."""
    return is_own_config(os.path.join(directory, "config.yaml")) or any(
        os.path.exists(os.path.join(directory, name, CHECKSUMS)) for name in _run_names(directory)
    )
