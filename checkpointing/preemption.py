"""Going on with a run: from which checkpoint, under which config; and stopping one so that it can go on.

What a run needs to go on as if it had never stopped are the tensors of the checkpoint and its `state.json`: the
counters, the position in the data, what has been evaluated and saved there, and how long the log files were.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import random
import shlex
import signal
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
import transformers
from omegaconf import DictConfig, OmegaConf

import workers
from checkpoints import CHECKSUMS, damage, read_tensors, tidy
from configuration import flatten
from placement import like
from utils import UserError, rank0_print

EXIT_CODE = 75  # of a run that a signal stopped; EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: what a scheduler is told to send before it kills

# Under another value of one of these it is another run; everything else may change on the way.
_DECIDES = (
    "batch_size", "dataset_paths", "datasets", "loss", "lora", "lr", "max_grad_norm", "max_length",
    "max_prompt_length", "model", "optimizer", "optimizer_args", "reference", "seed", "warmup_steps",
)  # fmt: skip
_DECIDES_NOTHING = ("local_run_dir", "resume", "resume_anyway", "model.block_name")


# ---- stopping -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal asked the run to stop, and its state is on disk."""


class StopSignal:
    """While it is entered, a first signal sets `received`, for training to act on; a second ends the process."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self):
        self.former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame):
        self.received = signal.Signals(number).name
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        text = f"\n{self.received}: stopping after this step and a save; once more ends the run at once\n"
        os.write(1, text.encode())  # print could be in the middle of something

    def check(self):
        """Raises Stopped if a signal has come, to any worker; all must call it."""
        if workers.largest(int(self.received is not None)):
            raise Stopped(self.received or "a signal to another worker")


def resume_command(run_dir: str) -> str:
    """The command that goes on with this run."""
    words = [word for word in sys.argv[1:] if not word.lstrip("+").startswith(("resume=", "local_run_dir="))]
    command = shlex.join([sys.argv[0], *words, f"resume={run_dir}"])
    return f"{'the launcher with' if workers.by_launcher() else 'python'} {command}"


def how_to_go_on(run_dir: str) -> str:
    """A last line for a run that ended early: which checkpoint it leaves, and how to go on from there."""
    for path in _newest_first(run_dir):
        if os.path.exists(os.path.join(path, CHECKSUMS)):
            return f"The last checkpoint is {path}; to go on from it: {resume_command(run_dir)}"
    return f"There is no checkpoint in {run_dir} yet."


# ---- random generators ----------------------------------------------------------------------------------------------


def _gpus() -> list[int]:
    """The GPUs whose random generators are this worker's."""
    return [torch.cuda.current_device()] if dist.is_initialized() else list(range(torch.cuda.device_count()))


def rng_states() -> dict:
    """The states of this worker's random generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _gpus()] if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_states(states: dict):
    """Put this worker's random generators where they were."""
    torch.set_rng_state(states["torch"])
    gpus = _gpus() if torch.cuda.is_available() else []
    if len(states["cuda"]) != len(gpus):
        rank0_print(f"WARNING: {len(states['cuda'])} GPUs then, {len(gpus)} now: samples will differ")
    for gpu, state in zip(gpus, states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, gpu)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


# ---- which checkpoint -----------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What the numbers may depend on besides the config."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def read_position(checkpoint: str) -> dict:
    """The state.json of a whole checkpoint."""
    with open(os.path.join(checkpoint, "state.json"), encoding="utf-8") as file:
        return json.load(file)


def _examples(checkpoint: str) -> int:
    """How many examples a checkpoint has behind it; where its state.json is damaged, by its name."""
    name = os.path.basename(checkpoint)
    try:
        return int(read_position(checkpoint)["examples"])
    except (OSError, ValueError, KeyError, TypeError):
        return int(name[5:]) if name.startswith("step-") else sys.maxsize


def _newest_first(run_dir: str) -> list[str]:
    """The checkpoints of a run, whole or damaged; links to others are none of their own."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    names = [name for name in names if name == "LATEST" or (name.startswith("step-") and name[5:].isdecimal())]
    paths = [os.path.join(run_dir, name) for name in names]
    return sorted((p for p in paths if not os.path.islink(p)), key=lambda path: (_examples(path), path), reverse=True)


def locate_run(config: DictConfig, run_dir_given: bool):
    """Set `local_run_dir` to the directory of the run that `resume` names; `run_dir_given`: it isn't the default.

    Raises: UserError if there is no such directory, or the two contradict each other.
    """
    if config.resume is None:
        return
    if config.resume == "auto":
        if not run_dir_given:
            raise UserError("resume=auto goes on with the run in local_run_dir: give that, too, the same every time")
        return
    path = os.path.abspath(config.resume)
    if not os.path.isdir(path):
        raise UserError(f"resume={config.resume}: no such directory; give a run directory, a checkpoint in it, or auto")
    is_run = os.path.exists(os.path.join(path, "config.yaml"))
    run_dir = path if is_run else os.path.dirname(os.path.realpath(path))
    if run_dir_given and os.path.realpath(config.local_run_dir) != os.path.realpath(run_dir):
        raise UserError(
            f"local_run_dir={config.local_run_dir}, but resume={config.resume} goes on in {run_dir}: leave "
            "local_run_dir out; model.archive starts a new run from a checkpoint's weights"
        )
    config.local_run_dir = run_dir


def find_checkpoint(config: DictConfig) -> str | None:
    """The checkpoint that `resume` means, known to be whole. None: begin at the beginning, as `resume` is null, or
    auto with nothing to go on from.

    Raises: UserError if there is none, if it is damaged, or if the run has got further than it.
    """
    run_dir = config.local_run_dir
    if config.resume is None or not os.path.isdir(run_dir):
        return None
    tidy(run_dir)
    if config.resume != "auto" and os.path.realpath(config.resume) != os.path.realpath(run_dir):
        return _given_checkpoint(config, os.path.realpath(config.resume))
    checkpoint = _newest_whole(run_dir)
    if checkpoint is None and config.resume != "auto":
        raise UserError(
            f"resume={config.resume}: there is no checkpoint in it yet; resume=auto begins at the beginning"
        )
    return checkpoint


def _newest_whole(run_dir: str) -> str | None:
    damaged = []
    for path in _newest_first(run_dir):
        reason = damage(path)
        if reason is None:
            return path
        damaged.append(path)
        rank0_print(f"WARNING: {path} can't be used: {reason}; looking for the one before it")
    if damaged:
        raise UserError(
            f"local_run_dir={run_dir}: none of its checkpoints is whole: {', '.join(damaged)}. Move them away to begin "
            "at the beginning"
        )
    return None


def _given_checkpoint(config: DictConfig, path: str) -> str:
    if reason := damage(path):
        raise UserError(
            f"resume={config.resume} is no whole checkpoint: {reason}. resume={config.local_run_dir} goes on from the "
            f"newest one that is; model.archive={config.resume} starts a new run from weights alone"
        )
    others = _newest_first(config.local_run_dir)
    later = [other for other in others if _examples(other) > _examples(path) and damage(other) is None]
    if later:
        raise UserError(
            f"resume={config.resume}: the run has got further: {', '.join(later)}. Going on from here would replace "
            f"them and what was logged since; move them elsewhere first, or give resume={config.local_run_dir}"
        )
    return path


def load_optimizer_state(
    checkpoint: str,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    config: DictConfig,
):
    """Take the states of optimizer and scheduler from a checkpoint; the settings are those of the config.

    Raises: UserError if it holds none for this optimizer, unless `resume_anyway` is true.
    """
    position, path = read_position(checkpoint), os.path.join(checkpoint, "optimizer.pt")
    try:
        if not os.path.exists(path):
            raise ValueError("it was written with save_optimizer=false")
        if position["optimizer"] != config.optimizer:
            raise ValueError(f"it is of {position['optimizer']}")
        optimizer.load_state_dict(_as_placed(read_tensors(path, mmap=True)["state"], optimizer))
        scheduler.load_state_dict(read_tensors(os.path.join(checkpoint, "scheduler.pt"))["state"])
    except (ValueError, KeyError) as error:
        message = f"{checkpoint} holds no state for optimizer={config.optimizer}: {error}"
        if not config.resume_anyway:
            raise UserError(f"{message}; resume_anyway=true begins with a new one") from error
        rank0_print(f"WARNING: {message}; beginning with a new one")
        scheduler.last_epoch = position["updates"]
    scheduler.base_lrs = [config.lr] * len(optimizer.param_groups)
    for group, scale in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        lr = config.lr * scale(scheduler.last_epoch)
        group.update({**optimizer.defaults, "initial_lr": config.lr, "lr": lr})
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _as_placed(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state dict with its tensors spread over the workers as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != sum(len(group["params"]) for group in state["param_groups"]):
        raise ValueError("it is of another number of parameters")
    placed = {
        number: {
            key: like(parameters[number], value).clone() if isinstance(value, torch.Tensor) else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": placed}


@contextlib.contextmanager
def claimed(run_dir: str) -> Iterator[None]:
    """Hold a run directory; a process that dies lets go of it.

    Raises: UserError if another process holds it.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"local_run_dir={run_dir}: another process is running this run") from None
        yield
    finally:
        os.close(descriptor)


# ---- under which config ---------------------------------------------------------------------------------------------


def _decides(key: str) -> bool:
    return key not in _DECIDES_NOTHING and key.split(".")[0] in _DECIDES


def config_hash(config: DictConfig) -> str:
    """A hash of what makes it this run and no other: SHA-256, in hexadecimal."""
    deciding = {key: value for key, value in flatten(config).items() if _decides(key)}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()


def check_same_run(config: DictConfig, checkpoint: str | None):
    """Say what of the config has changed since the run began.

    Raises: UserError if it makes another run of it, unless `resume_anyway` is true.
    """
    path = os.path.join(config.local_run_dir, "config.yaml")
    if not os.path.exists(path) and checkpoint is None:
        return
    try:
        former, now = flatten(OmegaConf.load(path)), flatten(config)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: can't read the config that the run began with: {error}") from error
    changes = {
        key: f"{key}: {former.get(key, 'absent')} → {now.get(key, 'absent')}"
        for key in sorted(former.keys() | now.keys())
        if key not in _DECIDES_NOTHING and former.get(key) != now.get(key)
    }
    if changes:
        rank0_print("Changed since the run began:\n  " + "\n  ".join(changes.values()))
    refused = [change for key, change in changes.items() if _decides(key)]
    position = read_position(checkpoint) if checkpoint else {"config_sha256": None, "versions": versions()}
    if not refused and position["config_sha256"] not in (None, config_hash(config)):
        refused = [f"{path} is not the config under which {checkpoint} was written"]
    if refused and not config.resume_anyway:
        raise UserError(
            f"resume={config.resume}: under this config it would be another run:\n  " + "\n  ".join(refused) + "\n"
            "Give these keys their former values, start a new run (model.archive takes the weights along), or go on "
            "nevertheless with resume_anyway=true"
        )
    if position["versions"] != versions():
        rank0_print(f"WARNING: begun with {position['versions']}, now {versions()}: the numbers may differ a little")
