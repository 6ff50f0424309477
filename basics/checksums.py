"""Write and check SHA256SUMS, the checksums of a directory's files in the format of `sha256sum`."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from basics.files import open_regular, sha256
from basics.outputs import CHECKSUMS

# a relative path without `..`: tokenizers write a folder, additional_chat_templates
_LINE = re.compile(r"([0-9a-f]{64})  ((?:(?!\.\.?/)[^/\0]+/)*(?!\.\.?$)[^/\0]+)")


def write_checksums(directory: str, without: str | None = None, known: Mapping[str, str] | None = None):
    """Write the SHA-256 of every file in a directory except `without`; files whose SHA-256 is `known` aren't read."""
    paths, known = [path for path in Path(directory).rglob("*") if path.is_file()], known or {}
    names = sorted({path.relative_to(directory).as_posix() for path in paths} - {without})
    lines = [f"{known.get(name) or sha256(os.path.join(directory, name))}  {name}\n" for name in names]
    with open(os.path.join(directory, CHECKSUMS), "w", encoding="utf-8") as file:
        file.writelines(lines)


def read_checksums(directory: str) -> dict[str, str]:
    """Return the recorded SHA-256 of each file, in hexadecimal.

    Raises: OSError; ValueError if a line isn't in the format of `sha256sum`.
    """
    with open_regular(os.path.join(directory, CHECKSUMS)) as file:
        lines = file.read().decode().splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    if None in matches:
        raise ValueError(f"line {matches.index(None) + 1} of {CHECKSUMS} is not a SHA-256 and a file's name")
    return {match[2]: match[1] for match in matches}


def verify_checksum(directory: str, name: str, digest: str | None, hash_file: Callable[[str], str] = sha256):
    """Raise ValueError if a file's SHA-256 is not `digest`."""
    if hash_file(os.path.join(directory, name)) != digest:
        raise ValueError(f"{name} doesn't match its checksum in {CHECKSUMS}: the file is damaged")


def find_damage(directory: str, needed: Iterable[str], hash_file: Callable[[str], str] = sha256) -> str | None:
    """Return which file of a directory is missing, or has changed since it was written; None if all are whole."""
    try:
        checksums = read_checksums(directory)
        if missing := set(needed) - checksums.keys():
            return f"{CHECKSUMS} lacks {', '.join(sorted(missing))}"
        for name, digest in checksums.items():
            verify_checksum(directory, name, digest, hash_file)
    except (OSError, ValueError) as error:
        return str(error)
    return None
