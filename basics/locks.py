"""Locks that keep a second process out of a file or a directory."""

import contextlib
import os
import socket
from collections.abc import Iterator

from basics.errors import UserError
from basics.files import has_no_room
from basics.printing import rank0_print

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
_held: set[int] = set()  # descriptors of locked files


def _close_in_child():
    """Close locked files in a forked child: a lock lasts as long as any process has its file open."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)  # programs started by exec don't inherit the file


@contextlib.contextmanager
def locked(path: str, origin: str, busy: str) -> Iterator[int]:
    """Lock a file for this process alone, and yield its descriptor.

    The file is created if needed, and removed at the end if it is empty.

    The lock is an flock, which the system releases however the process ends. It also holds between machines that share
    the directory, if the file system passes flock on, as CephFS, NFS and Lustre (mounted with `flock`) do. If a machine
    crashes, the server releases its locks, on NFS after a minute or two. A mount that keeps locks local (`nolock`,
    `local_lock`, `localflock`) shuts out only this machine's processes. If the file system has no locks at all, a
    warning is printed. Windows has no flock: there `filelock` locks a second file, so `path` can still be read.

    Args:
        origin: key and value that name the file, for messages.
        busy: the error message if another process holds the lock.

    Raises: UserError if another process holds it; OSError if it can't be opened.
    """
    if fcntl is None:
        with _locked_beside(path, origin, busy) as descriptor:
            yield descriptor
        return
    descriptor = _open_locked(path, origin, busy)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_size == 0:
                os.remove(path)
        _close(descriptor)


@contextlib.contextmanager
def _locked_beside(path: str, origin: str, busy: str) -> Iterator[int]:
    """Do what `locked` does, by a lock on `path`.lock."""
    import filelock

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        lock = filelock.FileLock(f"{path}.lock", blocking=False)
        lock.acquire()
    except filelock.Timeout:
        raise _busy(path, origin, busy) from None
    try:
        descriptor = os.open(path, _FLAGS, 0o666)
        try:
            yield descriptor
        finally:
            is_empty = os.fstat(descriptor).st_size == 0
            os.close(descriptor)  # Windows removes no open file
            if is_empty:
                os.remove(path)
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # another process has locked it, and has it open
            os.remove(f"{path}.lock")


def _busy(path: str, origin: str, busy: str) -> UserError:
    """Return the error for a lock that another process holds; name the process if the file does."""
    holder = ""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        holder = file.read(200).decode(errors="replace").strip()
    who = f": {holder}" if holder.startswith("process ") else ""
    return UserError(f"{origin}: {busy}{who}; wait until that has ended, or give another place")


@contextlib.contextmanager
def locked_directory(directory: str, origin: str, busy: str) -> Iterator[None]:
    """Lock a directory for this process alone, by a file `.lock` in it that says who holds it.

    The directory is created if need be, and removed again if it stays empty.

    Raises: UserError if another process holds it, naming it, or if the directory can't be read and written.
    """
    path = os.path.abspath(directory)
    created = []
    while not os.path.lexists(path):
        created.append(path)
        path = os.path.dirname(path)
    try:
        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(locked(os.path.join(directory, ".lock"), origin, busy))
                os.listdir(directory)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                stack.callback(os.ftruncate, descriptor, 0)  # an empty lock file is removed
            except OSError as error:
                remedy = "make room there" if has_no_room(error) else "give a directory that can be written"
                raise UserError(f"{origin}: can't write there: {error}; {remedy}") from error
            yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):  # it isn't empty
                os.rmdir(path)


@contextlib.contextmanager
def in_turn(path: str) -> Iterator[None]:
    """Let one process at a time run the block, which changes a file; others wait, if the file system has locks.

    Raises: OSError if it can't be opened.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is None:
            import filelock

            stack.enter_context(filelock.FileLock(f"{path}.lock"))
        else:
            file = stack.enter_context(open(path, "ab"))
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_locked(path: str, origin: str, busy: str) -> int:
    """Return a descriptor of the locked file. Raises: UserError and OSError as `locked` does."""
    while True:
        try:
            descriptor = os.open(path, _FLAGS, 0o666)
        except FileNotFoundError:  # the directory is new, or another process has just removed it
            parent = os.path.dirname(path) or "."
            if os.path.islink(parent):
                raise  # it leads nowhere
            with contextlib.suppress(FileExistsError):  # another process creates it, too
                os.makedirs(parent, exist_ok=True)
            continue
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _close(descriptor)
            raise _busy(path, origin, busy) from None
        except OSError as error:
            rank0_print(
                f"WARNING: {origin}: its file system has no locks ({error}): nothing keeps a second process out"
            )
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        _close(descriptor)  # its holder has removed the file in the meantime


def _close(descriptor: int):
    _held.discard(descriptor)
    os.close(descriptor)
