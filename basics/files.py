"""Files that are written whole or not at all, JSON Lines that a crash may have cut off, and hashes of whole files.

Only the standard library is imported, so that commands which only read files start at once.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from basics.errors import UserError

_FLUSHES_DIRECTORIES = os.name == "posix"  # Windows can't open directories, and flushes only files open for writing
PARTIAL = r"\.partial-[0-9a-f]{8}"  # regular expression for the suffix of unfinished files
LFS_POINTER = b"version https://git-lfs"  # the first bytes of a file that git lfs hasn't replaced by its content


# ---- failed writes ---------------------------------------------------------------------------------------------------

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, `ulimit -f`


class CannotWrite(OSError, UserError):
    """A file couldn't be written; its message names the file, the reason and the remedy."""

    def __str__(self) -> str:
        return f"can't write to {self.filename}: {explain_failed_write(self)}"


def has_no_room(error: BaseException) -> bool:
    """True if an error says that a disk or quota is full, or that a file reaches a size limit."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def explain_failed_write(error: OSError) -> str:
    """Return why a write failed, and the remedy."""
    remedy = "make room" if has_no_room(error) else "make sure that it can be written"
    return f"{error.strerror}; {remedy}, and give the same command again: what is written is kept"


@contextlib.contextmanager
def write_errors_named(path: str) -> Iterator[None]:
    """Turn an OSError inside the block into `CannotWrite`, because the OSError of a write doesn't name its file.

    An OSError that names another file is raised as it is, unless it names a directory above `path`.
    """
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        named = error.filename
        if isinstance(named, str) and not named.startswith(path) and not path.startswith(named):
            raise
        raise CannotWrite(error.errno, error.strerror or str(error), path) from error


# ---- whole files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str, binary: bool = False) -> Iterator[IO]:
    """Open a temporary file that replaces `path`, flushed to disk, on exit. After an error `path` is unchanged.

    Raises: CannotWrite.
    """
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    with write_errors_named(path):
        try:
            with open(partial, "wb") if binary else open(partial, "w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise


def open_regular(path: str) -> IO:
    """Open a file to read its bytes. Raises: OSError if it is a pipe or a device, from which reading might not end."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return open(path, "rb")


def flush_to_disk(*paths: str):
    """Flush files or directories to the disk, so that nothing written later gets there first."""
    for path in paths:
        if not _FLUSHES_DIRECTORIES and os.path.isdir(path):
            continue
        descriptor = os.open(path, os.O_RDONLY if _FLUSHES_DIRECTORIES else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- JSON Lines -----------------------------------------------------------------------------------------------------


def read_json_lines(path: str, skips_damaged: bool = False) -> Iterator[tuple[dict, int]]:
    """Yield the JSON object of each line, and the offset (bytes) where the line ends.

    A last line without a line break was cut off by a crash; it is left out.

    Args:
        skips_damaged: leave out whole lines that hold no JSON object; otherwise they raise ValueError.
    """
    end = 0
    with open_regular(path) as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # nested too deeply
                value = None
            if isinstance(value, dict):
                yield value, end
            elif not skips_damaged:
                raise ValueError(f"no JSON object: {line[:100]!r}")


def append_json_lines(path: str, values: Iterable[dict]):
    """Append a line for each value, all or none of them; if a crash cut off the last line, end that one first.

    Raises: CannotWrite; the file is then unchanged.
    """
    with write_errors_named(path), open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        is_cut_off = size > 0 and file.read(1) != b"\n"
        append_whole(file.fileno(), b"\n" * is_cut_off + b"".join(map(json_line, values)))


def json_line(value: dict) -> bytes:
    """Return a value as a line of JSON; half a surrogate pair, which UTF-8 can't encode, is escaped."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def append_whole(descriptor: int, data: bytes):
    """Append bytes to a file, in one write if possible; after an error none of them are in it."""
    size, rest = os.fstat(descriptor).st_size, memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        with contextlib.suppress(OSError):  # a device can't be truncated
            os.ftruncate(descriptor, size)
        raise


# ---- hashes of whole files ------------------------------------------------------------------------------------------

_HASHES = "file_hashes.jsonl"  # the cache's file
_SETTLED = 2  # seconds; a file changed more recently may change again without a new timestamp


def sha256(path: str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class HashCache:
    """Caches SHA-256 hashes of files, which are identified by device, inode, size, mtime and ctime.

    Programs can't set ctime, so a file restored by tar or rsync is read again. The cache can't notice
    damage to the disk itself, so checksums of checkpoints are computed without it.
    """

    directory: str

    @functools.cached_property
    def known(self) -> dict[tuple, str]:
        """The cached hashes, by device, inode, size, mtime and ctime."""
        known = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for line, _ in read_json_lines(os.path.join(self.directory, _HASHES)):
                known[tuple(line["stat"])] = line["sha256"]
        return known

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file's bytes, in hexadecimal."""
        info = os.stat(path)
        key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if key not in self.known:
            digest = sha256(path)
            if time.time() - info.st_ctime < _SETTLED:
                return digest
            self.known[key] = digest
            with contextlib.suppress(OSError):  # then the file is read again next time
                os.makedirs(self.directory, exist_ok=True)
                append_json_lines(os.path.join(self.directory, _HASHES), [{"stat": key, "sha256": digest}])
        return self.known[key]


def content_hash(paths: Iterable[str], cache_dir: str | None) -> str:
    """Return a SHA-256 of the contents of files, in order; each file's hash is cached in `cache_dir`."""
    hash_file = HashCache(cache_dir).sha256 if cache_dir is not None else sha256
    return hashlib.sha256("".join(map(hash_file, paths)).encode()).hexdigest()
