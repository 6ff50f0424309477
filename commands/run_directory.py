"""The lock of a run directory, so that only one process at a time reads, writes and tidies what is in it."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from utils import UserError

LOCK = ".lock"

_held: set[int] = set()  # descriptors of locked files


def _close_in_child():
    """A lock lasts while anybody has its file open: a forked helper that outlives this process must not."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)  # what is started by exec doesn't get the file anyway


@contextlib.contextmanager
def claimed(run_dir: str) -> Iterator[None]:
    """Hold a run directory for this process alone; it is created if need be, and removed again if it stays empty.

    The lock is an flock on the file `.lock` in it, which says who holds it. It ends with this process, however that
    ends. Between machines that share the directory it holds where the file system passes flock on: NFS (Linux makes it
    a byte-range lock, which NFSv4 always has, NFSv3 with its lock service), Lustre mounted with `flock`, CephFS. When a
    machine crashes the server gives its locks up, on NFS after a minute or two. A mount that keeps locks local
    (`nolock`, `local_lock`, `localflock`) looks the same from here and shuts out this machine's processes alone. Where
    there are no locks at all, a warning says so.

    Raises: UserError if another process holds it, naming it, or if the directory can't be read and written.
    """
    path = Path(run_dir)
    created = [directory for directory in (path, *path.parents) if not os.path.exists(directory)]
    descriptor = None
    try:
        try:
            descriptor = _open_locked(run_dir)
            os.listdir(run_dir)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            raise UserError(
                f"local_run_dir={run_dir}: can't write there: {error}; give a directory that can be written"
            ) from error
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.remove(path / LOCK)
            _close(descriptor)
        for directory in created:
            with contextlib.suppress(OSError):  # it isn't empty
                directory.rmdir()


def _open_locked(run_dir: str) -> int:
    """A descriptor of the lock's file, locked; see `claimed` for what is raised."""
    path = os.path.join(run_dir, LOCK)
    while True:
        try:
            with contextlib.suppress(FileExistsError):  # gone again, or a file, which opening tells
                os.makedirs(run_dir, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just been refused, and has removed the directory
            continue
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            _close(descriptor)
            raise UserError(
                f"local_run_dir={run_dir}: another process is running this run{f': {holder}' if holder else ''}; wait "
                "for its end, or give another local_run_dir"
            ) from None
        except OSError as error:
            print(
                f"WARNING: local_run_dir={run_dir}: its file system has no locks ({error}): nothing keeps a second "
                "process out of this run"
            )
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        _close(descriptor)  # whoever held it has removed the file meanwhile


def _close(descriptor: int):
    _held.discard(descriptor)
    os.close(descriptor)
