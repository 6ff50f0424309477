"""Make and follow LATEST and BEST: links to a checkpoint beside them or, on Windows, files that contain its name."""

import os
import re
from pathlib import Path

NAMES = ("LATEST", "BEST")
_TARGET = re.compile(rb"(step-[0-9]{1,30})\n?")


def make_link(target: str, path: str):
    """Make `path` a symbolic link to `target` in the same directory, or else a file that contains the target's name."""
    try:
        os.symlink(target, path)
    except (OSError, NotImplementedError):
        if os.path.lexists(path):
            raise
        with open(path, "xb") as file:
            file.write(f"{target}\n".encode())


def link_target(path: str) -> str | None:
    """Return the target of a symbolic link, or of a file that serves as one; None for any other path."""
    if os.path.islink(path):
        return os.readlink(path)
    if os.path.basename(path) not in NAMES or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        match = _TARGET.fullmatch(file.read(64))
    return match[1].decode() if match else None


def followed(path: str) -> str:
    """Return a path in which each file that serves as a link is replaced by the checkpoint that it names."""
    parts = Path(path).parts
    for n, name in enumerate(parts, 1):
        link = os.path.join(*parts[:n])
        if name in NAMES and not os.path.islink(link) and (target := link_target(link)) is not None:
            path = os.path.join(os.path.dirname(link), target, *parts[n:])
    return path
