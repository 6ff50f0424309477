"""Find the checkpoint that a run is resumed from, and tell the user how to resume."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator

from omegaconf import DictConfig

from basics.links import followed, link_target
from basics.outputs import CHECKSUMS, is_checkpoint_name, is_run
from checkpointing.atomic_directory import recover_interrupted_saves
from checkpointing.integrity import find_corruption
from checkpointing.train_state import read_state_json, training_settings
from config_checks.overrides import quoted_path
from distributed import environment
from utils import UserError, rank0_print

SWEEP = "DPO_SWEEP"  # environment variable, set in all processes of a sweep


def _examples(checkpoint: str) -> int:
    """Return the number of examples trained on; if state.json is damaged, read it from the checkpoint's name."""
    name = os.path.basename(checkpoint)
    try:
        return int(read_state_json(checkpoint)["examples"])
    except (OSError, ValueError, KeyError):
        return int(name[5:]) if name.startswith("step-") else sys.maxsize


def _newest_first(run_dir: str) -> list[str]:
    """Return the checkpoints of a run, damaged ones included, links excluded."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    paths = [os.path.join(run_dir, name) for name in names if is_checkpoint_name(name)]
    paths = [path for path in paths if link_target(path) is None]
    return sorted(paths, key=lambda path: (_examples(path), is_last(path)), reverse=True)


def locate_run(config: DictConfig, run_dir_given: bool):
    """Set `local_run_dir` to the directory of the run that `resume` names.

    Args:
        run_dir_given: the user gave `local_run_dir`.

    Raises: UserError if there is no such directory, or if the user gave another `local_run_dir`.
    """
    if config.resume == "auto":
        if not run_dir_given:
            raise UserError(
                "resume=auto resumes the run in local_run_dir: also give local_run_dir, the same one every time"
            )
        return
    path = os.path.abspath(config.resume)
    if not os.path.isdir(path):
        raise UserError(f"resume={config.resume}: no such directory; give a run directory, a checkpoint in it, or auto")
    try:
        run_dir = path if is_run(path) else os.path.dirname(os.path.realpath(path))
    except OSError as error:
        raise UserError(f"resume={config.resume}: can't read it: {error}") from error
    is_checkpoint = is_checkpoint_name(os.path.basename(os.path.realpath(path)))
    if run_dir != path and not is_checkpoint and not os.path.exists(os.path.join(path, CHECKSUMS)):
        raise UserError(
            f"resume={config.resume}: neither a run directory, as there is no config.yaml in it, nor a checkpoint, as "
            f"there is no {CHECKSUMS}"
        )
    if run_dir_given and os.path.realpath(config.local_run_dir) != os.path.realpath(run_dir):
        raise UserError(
            f"local_run_dir={config.local_run_dir}, but resume={config.resume} resumes the run in {run_dir}: leave "
            "local_run_dir out; model.archive starts a new run from a checkpoint's weights"
        )
    config.local_run_dir = run_dir


def check_restartable(config: DictConfig, run_dir_given: bool):
    """Refuse a command that, restarted by its launcher, would begin the run again instead of resuming it.

    Raises: UserError naming the remedy.
    """
    if not (restarts := environment.max_restarts()) or (run_dir_given and config.resume == "auto"):
        return
    if config.resume is not None and is_run(config.resume):
        return
    where = "in a new directory" if not run_dir_given else f"with resume={config.resume or 'null'}"
    raise UserError(
        f"the launcher restarts a failed run (torchrun --max-restarts={restarts}), which would begin again {where}: "
        "give resume=auto and local_run_dir=DIR, the same for every attempt and machine, or use --max-restarts=0"
    )


def checkpoint_to_resume(config: DictConfig) -> str | None:
    """Return the undamaged checkpoint to resume from; None if `resume=auto` finds no checkpoint yet.

    Raises: UserError if `resume` names a run without checkpoints, if all of them are damaged, or if the run has later
        checkpoints than the one to resume from.
    """
    run_dir = config.local_run_dir
    if not os.path.isdir(run_dir):
        return None
    recover_interrupted_saves(run_dir)
    if config.resume != "auto" and os.path.realpath(config.resume) != os.path.realpath(run_dir):
        return _given_checkpoint(config, os.path.realpath(config.resume))
    checkpoint = _newest_undamaged(run_dir)
    if checkpoint is None and config.resume != "auto":
        raise UserError(
            f"resume={config.resume}: there is no checkpoint in it yet; resume=auto starts from the beginning"
        )
    return checkpoint


def _newest_undamaged(run_dir: str) -> str | None:
    """Return the newest undamaged checkpoint; None if there are no checkpoints."""
    damaged = []
    for path in _newest_first(run_dir):
        reason = find_corruption(path)
        if reason is None:
            return path
        damaged.append(path)
        rank0_print(f"WARNING: {path} can't be used: {reason}; trying the one before it")
    if damaged:
        raise UserError(
            f"local_run_dir={run_dir}: all of its checkpoints are damaged: {', '.join(damaged)}. Move them away to "
            "start from the beginning"
        )
    return None


def _given_checkpoint(config: DictConfig, path: str) -> str:
    if reason := find_corruption(path):
        raise UserError(
            f"resume={config.resume} is damaged: {reason}. resume={config.local_run_dir} resumes from the newest "
            f"undamaged checkpoint; model.archive={config.resume} starts a new run from weights alone"
        )
    others = _newest_first(config.local_run_dir)
    later = [other for other in others if _examples(other) > _examples(path) and find_corruption(other) is None]
    if later:
        raise UserError(
            f"resume={config.resume}: the run has got further: {', '.join(later)}. Resuming from here would replace "
            f"them and what was logged since; move them elsewhere first, or give resume={config.local_run_dir}"
        )
    return path


def resume_command(keys: dict[str, str | None]) -> str:
    """Return this process's command line with these keys set, or removed where the value is None."""
    words = [word for word in sys.argv[1:] if word.lstrip("+").split("=")[0] not in keys]
    words += [f"{key}={quoted_path(value)}" for key, value in keys.items() if value is not None]
    command = shlex.join([sys.argv[0], *words])
    return f"{'the launcher with' if environment.is_launched_by_user() else 'python'} {command}"


def resume_hint(run_dir: str) -> str:
    """Return the line that a run prints last if it ends early: its last checkpoint, and how to resume from it."""
    for path in _newest_first(run_dir):
        if os.path.exists(os.path.join(path, CHECKSUMS)):
            if SWEEP in os.environ:  # the sweep says how to resume all its jobs
                return f"The last checkpoint is {path}"
            command = resume_command({"local_run_dir": None, "resume": run_dir})
            return f"The last checkpoint is {path}; to resume from it: {command}"
    return f"There is no checkpoint in {run_dir} yet."


def is_complete(config: DictConfig, checkpoint: str) -> bool:
    """True if this checkpoint ended a run under exactly this config, so that nothing is left to do."""
    saved = read_state_json(checkpoint)
    return is_last(checkpoint) and saved.get("complete") is True and saved.get("config") == training_settings(config)


def is_last(checkpoint: str) -> bool:
    """True for LATEST, which a run writes last, after any step-N."""
    return os.path.basename(checkpoint) == "LATEST"


@contextlib.contextmanager
def resume_hinted(run_dir: str, error_class: type[Exception]) -> Iterator[None]:
    """Add a note to errors of this class that says how to resume the run."""
    try:
        yield
    except error_class as error:
        if isinstance(error, OSError) and not os.path.isdir(run_dir):
            raise UserError(
                f"local_run_dir={run_dir}: it was moved or removed while the run wrote there; move it back, and give "
                "the same command with resume=auto"
            ) from error
        error.add_note(resume_hint(run_dir))
        raise


def find_checkpoints(run_dir: str | None, requested: str | list[str]) -> list[str | None]:
    """Return the directories of the requested checkpoints of a run: names, or `all`. Without a run, return [None].

    Raises: UserError if one doesn't exist or is damaged.
    """
    if run_dir is None:
        if requested != "LATEST":
            raise UserError(f"checkpoint={requested} requires run=DIR; weights alone are given by model.archive")
        return [None]
    names = [str(name) for name in (requested if isinstance(requested, list) else [requested])]
    existing = [name for name in os.listdir(run_dir) if is_checkpoint_name(name)]
    existing = [name for name in existing if os.path.exists(followed(os.path.join(run_dir, name, "state.json")))]
    if names == ["all"]:
        names = [name for name in existing if link_target(os.path.join(run_dir, name)) is None]
        names.sort(key=lambda name: read_state_json(os.path.join(run_dir, name))["examples"])
    if not names:
        raise UserError(f"run={run_dir}: it has no checkpoint yet")
    return [_checked_checkpoint(str(run_dir), name, sorted(existing)) for name in names]


def _checked_checkpoint(run_dir: str, name: str, existing: list[str]) -> str:
    path = followed(os.path.join(run_dir, name))
    if name not in existing:
        listed = f"; it has {', '.join(existing)}" if existing else "; it has none yet"
        raise UserError(f"checkpoint={name}: {run_dir} has no such checkpoint{listed}")
    if (reason := find_corruption(os.path.realpath(path))) is not None:
        raise UserError(f"{path} can't be used: {reason}")
    return path
