"""The lock of a run directory, so that only one process at a time reads, writes and tidies what is in it."""

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from checkpointing import fingerprints
from utils import UserError, get_local_run_dir

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


def default_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """The default of `local_run_dir`: a new path, or the directory of a sweep's job."""
    return HydraConfig.get().runtime.output_dir if in_sweep() else get_local_run_dir(exp_name, local_dirs)


def is_run_dir_given(config: DictConfig) -> bool:
    """Whether `local_run_dir` is one that will be the same the next time."""
    if "get_local_run_dir:" not in str(OmegaConf.to_container(config, resolve=False)["local_run_dir"]):
        return True
    return in_sweep() and any(word.startswith("hydra.sweep.dir=") for word in HydraConfig.get().overrides.hydra)


def create_run_dir(config: DictConfig, inputs: dict[str, str] | None = None):
    """Create the run directory with the config in it; nothing before this writes anything but caches and a lock.

    Args:
        inputs: fingerprints of what the run starts from.
    """
    path = os.path.join(config.local_run_dir, "config.yaml")
    try:
        os.makedirs(config.local_run_dir, exist_ok=True)
        with open(f"{path}.partial-new", "w", encoding="utf-8") as file:
            file.write(fingerprints.header(inputs or {}) + OmegaConf.to_yaml(config))
        os.replace(f"{path}.partial-new", path)
    except OSError as error:
        raise UserError(f"local_run_dir={config.local_run_dir}: can't write there: {error}") from error
    print("=" * 80)
    print(f"Writing to {socket.gethostname()}:{config.local_run_dir}")
    print("=" * 80, flush=True)


def in_sweep() -> bool:
    """Whether what runs now is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job_name() -> str:
    """The job's overrides as the name of a directory, such that its path can be typed in an override."""
    overrides = [f"{key}-{value}" for key, value in job_overrides().items()]
    name = re.sub(r"[^\w.+-]+", "_", "_".join(overrides)) or f"job_{OmegaConf.select(HydraConfig.get(), 'job.num')}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def job_overrides() -> dict[str, str]:
    """What the sweep varies, as it is in this job: {'loss.beta': '0.1', ...}."""
    parser, varied = OverridesParser.create(), set(HydraConfig.get().sweeper.get("params") or {})
    for word in sys.argv[1:]:
        with contextlib.suppress(HydraException):  # options with a minus
            override = parser.parse_override(word)
            varied |= {override.get_key_element()} if override.is_sweep_override() else set()
    job = [parser.parse_override(word) for word in OmegaConf.to_container(HydraConfig.get().overrides.task)]
    return {o.key_or_group: o.get_value_element_as_str() for o in job if o.get_key_element() in varied}


_LONGEST_NAME = 150  # characters; file systems take 255 bytes
