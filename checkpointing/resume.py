"""Resume a run: find the checkpoint, and check that the config still describes the same run."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from basics.links import followed, link_target
from basics.outputs import CHECKSUMS, is_checkpoint_name, is_run, is_sharded
from basics.saved_config import read_saved_config
from checkpointing import fingerprints
from checkpointing.atomic_directory import recover_interrupted_saves
from checkpointing.integrity import find_corruption
from checkpointing.train_state import read_state_json, training_settings, versions
from config_checks.schema import REPOSITORY, default_config
from data.batches import split_name
from distributed import environment
from references import resolved_reference
from utils import UserError, rank0_print

SWEEP = "DPO_SWEEP"  # an environment variable of all processes of a sweep and its jobs

# Keys that may change when a run is resumed; a change of any other key makes it a different run.
_MAY_CHANGE = (
    "activation_checkpointing", "checkpoint_async", "checkpoint_format", "compile", "curves", "data_only", "debug",
    "deterministic", "do_first_eval",
    "eval_batch_size", "eval_every", "exp_name", "fsdp_cpu_offload", "fsdp_port", "fsdp_replicate",
    "gradient_accumulation_steps",
    "keep_best", "keep_checkpoints", "local_dirs", "max_tokens_per_microbatch", "minimum_log_interval_secs",
    "model.attn_implementation", "model.block_name", "model.trust_remote_code", "n_epochs", "n_eval_examples",
    "n_eval_model_samples", "n_examples", "padding_free", "precompute_ref_log_probs", "sample_during_eval",
    "save_every", "save_optimizer", "shared_prompt", "stop_when_worse", "tensor_parallel", "tensorboard.enabled",
    "trainer", "wandb.enabled", "wandb.entity", "wandb.project", "worker_timeout", "world_size",
)  # fmt: skip


# ---- which checkpoint -----------------------------------------------------------------------------------------------


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

    Raises: UserError if there is no such directory, or the two contradict each other.
    """
    if config.resume == "auto":
        if not run_dir_given:
            raise UserError("resume=auto resumes the run in local_run_dir: give that, too, the same every time")
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
    """Refuse a command that, if its launcher restarts it, would begin the run again instead of resuming it.

    Raises: UserError naming the remedy.
    """
    if not (restarts := environment.max_restarts()) or (run_dir_given and config.resume == "auto"):
        return
    if config.resume is not None and is_run(config.resume):
        return
    anew = "in a new directory" if not run_dir_given else f"with resume={config.resume or 'null'}"
    raise UserError(
        f"the launcher restarts a failed run (torchrun --max-restarts={restarts}), which would begin again {anew}: "
        "give resume=auto and local_run_dir=DIR, the same for every attempt and machine, or use --max-restarts=0"
    )


def find_checkpoint(config: DictConfig) -> str | None:
    """Return the undamaged checkpoint to resume from; None to start from the beginning.

    Raises: UserError if there is none, if it is damaged, or if the run has later ones.
    """
    run_dir = config.local_run_dir
    if not os.path.isdir(run_dir):
        return None
    recover_interrupted_saves(run_dir)
    if config.resume != "auto" and os.path.realpath(config.resume) != os.path.realpath(run_dir):
        return _given_checkpoint(config, os.path.realpath(config.resume))
    checkpoint = _newest_whole(run_dir)
    if checkpoint is None and config.resume != "auto":
        raise UserError(
            f"resume={config.resume}: there is no checkpoint in it yet; resume=auto starts from the beginning"
        )
    return checkpoint


def _newest_whole(run_dir: str) -> str | None:
    damaged = []
    for path in _newest_first(run_dir):
        reason = find_corruption(path)
        if reason is None:
            return path
        damaged.append(path)
        rank0_print(f"WARNING: {path} can't be used: {reason}; trying the one before it")
    if damaged:
        raise UserError(
            f"local_run_dir={run_dir}: none of its checkpoints is whole: {', '.join(damaged)}. Move them away to "
            "start from the beginning"
        )
    return None


def _given_checkpoint(config: DictConfig, path: str) -> str:
    if reason := find_corruption(path):
        raise UserError(
            f"resume={config.resume} is no whole checkpoint: {reason}. resume={config.local_run_dir} resumes from the "
            f"newest whole one; model.archive={config.resume} starts a new run from weights alone"
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
    """Return this process's command with these keys set to other values, or left out where the value is None."""
    words = [word for word in sys.argv[1:] if word.lstrip("+").split("=")[0] not in keys]
    words += [f"{key}={quoted(value)}" for key, value in keys.items() if value is not None]
    command = shlex.join([sys.argv[0], *words])
    return f"{'the launcher with' if environment.is_launched_by_user() else 'python'} {command}"


def quoted(path: str) -> str:
    """Return a path as Hydra reads it in an override."""
    return path if re.fullmatch(r"[\w./-]+", path) else "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def resume_hint(run_dir: str) -> str:
    """Return the last line that a run prints if it ends early: its last checkpoint, and how to resume from it."""
    for path in _newest_first(run_dir):
        if os.path.exists(os.path.join(path, CHECKSUMS)):
            if SWEEP in os.environ:  # the sweep says how to resume all its jobs
                return f"The last checkpoint is {path}"
            command = resume_command({"local_run_dir": None, "resume": run_dir})
            return f"The last checkpoint is {path}; to resume from it: {command}"
    return f"There is no checkpoint in {run_dir} yet."


def is_complete(config: DictConfig, checkpoint: str) -> bool:
    """True if training under exactly this config ended with this checkpoint, so that nothing is left to do."""
    saved = read_state_json(checkpoint)
    return is_last(checkpoint) and saved.get("complete") is True and saved.get("config") == training_settings(config)


def is_last(checkpoint: str) -> bool:
    """True for the checkpoint that a run writes last: LATEST, even after a step-N at the end of training."""
    return os.path.basename(checkpoint) == "LATEST"


# ---- under which config ---------------------------------------------------------------------------------------------


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, OmegaConfBaseException)


def _former_config(config: DictConfig, checkpoint: str | None) -> dict[str, object] | None:
    """Return the flat config under which a checkpoint was written, else the one in the run directory, if any."""
    saved = read_state_json(checkpoint) if checkpoint is not None else {}
    if "config" in saved:
        return saved["config"]
    path = os.path.join(config.local_run_dir, "config.yaml")
    if checkpoint is None and not os.path.exists(path):
        return None
    try:
        former = read_saved_config(path)
        former.reference = resolved_reference(former)
        former = training_settings(former)
        if former["model.name_or_path"].endswith("/models/tiny"):  # where model=tiny was before 0.2
            former["model.name_or_path"] = str(REPOSITORY / "assets/tiny")
    except _UNREADABLE as error:
        raise UserError(
            f"{path}: can't read the config that the run began with ({type(error).__name__}: {str(error)[:300]}). Put "
            "it back as it was, or move it away to start from the beginning"
        ) from error
    return former


def _former_inputs(config: DictConfig, checkpoint: str | None) -> dict[str, str]:
    """Return the fingerprints of what the run started from; runs of earlier versions have none."""
    if checkpoint is not None:
        return read_state_json(checkpoint).get("inputs", {})
    path = os.path.join(config.local_run_dir, "config.yaml")
    try:
        return fingerprints.read_header(path) if os.path.exists(path) else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: can't read its first line: {error}. Move it away to start from the beginning"
        ) from error


def check_same_run(config: DictConfig, checkpoint: str | None, files: dict[str, str]):
    """Print what has changed in the config; refuse changes that make it a different run.

    Args:
        files: today's `file_fingerprints`; a file may have moved, but not changed.

    Raises: UserError naming what differs, unless `resume_anyway` is true.
    """
    former, former_inputs = _former_config(config, checkpoint), _former_inputs(config, checkpoint)
    if former is None:
        return
    if config.model.reference_dtype is None:  # earlier versions had another default
        config.model.reference_dtype = former.get("model.reference_dtype")
    now, defaults = training_settings(config), default_config(config.loss.name)
    former = {**{key: defaults[key] for key in now.keys() & defaults.keys()}, **former}  # keys added since then
    changes = {
        key: f"{key}: {former.get(key, 'absent')} → {now.get(key, 'absent')}"
        for key in sorted(former.keys() | now.keys())
        if former.get(key) != now.get(key)
    }
    if changes:
        rank0_print("Changed since the run began:\n  " + "\n  ".join(changes.values()))
    changed = set(fingerprints.changed_models(config, former_inputs, files))
    only_moved = (files.keys() & former_inputs.keys()) - changed
    if former_inputs.get("model.name_or_path", "") == now["model.revision"]:  # the commit is unchanged
        only_moved.add("model.revision")
    # the content of data is compared once it is loaded
    only_moved |= {f"dataset_paths.{name}" for name in config.dataset_paths
                   if split_name(name, "train") in former_inputs}  # fmt: skip
    refused = [change for key, change in changes.items() if key not in _MAY_CHANGE and key not in only_moved]
    if refused and not config.resume_anyway:
        raise UserError(
            f"resume={config.resume}: under this config it would be another run:\n  " + "\n  ".join(refused) + "\n"
            "Give these keys their former values, start a new run (model.archive takes the weights along), or resume "
            "nevertheless with resume_anyway=true"
        )
    if checkpoint is not None:
        _check_kind(config, checkpoint)
    refuse_changed_inputs(config, changed_inputs(config, checkpoint, files))
    former_versions = read_state_json(checkpoint).get("versions") if checkpoint else versions()
    if former_versions != versions():
        rank0_print(f"WARNING: begun with {former_versions}, now {versions()}: the numbers may differ a little")


def _check_kind(config: DictConfig, checkpoint: str):
    """Refuse a checkpoint that lacks what the config needs, an adapter or a reference, even with `resume_anyway`.

    Raises: UserError naming the key and the remedy.
    """
    remedy = "leave it as it was, or start a new run from its weights with"
    holds_adapter = os.path.exists(os.path.join(checkpoint, "adapter_config.json"))
    trains_adapter = config.lora is not None or config.model.adapter is not None
    if trains_adapter and not holds_adapter:
        key = "lora" if config.lora is not None else "model.adapter"
        raise UserError(
            f"{key}={OmegaConf.select(config, key)}: {checkpoint} holds all weights, not an adapter; {remedy} "
            f"model.archive={checkpoint}"
        )
    if holds_adapter and not trains_adapter:
        raise UserError(f"lora=null: {checkpoint} holds an adapter; {remedy} model.adapter={checkpoint}")
    if config.reference_update_every is not None and not _holds_reference(checkpoint):
        raise UserError(
            f"reference_update_every={config.reference_update_every}: {checkpoint} has no reference.pt, as its run's "
            f"reference stayed as it was; {remedy} model.archive={checkpoint}"
        )


def _holds_reference(checkpoint: str) -> bool:
    if is_sharded(checkpoint):
        from checkpointing.sharded import ShardedCheckpoint  # takes seconds to import

        return bool(ShardedCheckpoint(checkpoint).state_dict("reference"))
    return os.path.exists(os.path.join(checkpoint, "reference.pt"))


def changed_inputs(config: DictConfig, checkpoint: str | None, inputs: dict[str, str]) -> list[str]:
    """Return the lines of a message about those of the inputs that have changed since the run began."""
    return _as_lines(config, _former_inputs(config, checkpoint), inputs)


def _as_lines(config: DictConfig, former: dict[str, str], inputs: dict[str, str]) -> list[str]:
    lines = []
    for name in sorted(fingerprints.changed_models(config, former, inputs)):
        lines.append(f"{name}={OmegaConf.select(config, name)}" if fingerprints.is_of_model(name) else name)
        if name == "model.name_or_path" and re.fullmatch("[0-9a-f]{40}", former[name]):
            lines.append(f"  model.revision={former[name]} is the commit on the hub that the run began with")
    return lines


def refuse_changed_inputs(config: DictConfig, changed: list[str]):
    """Raise UserError if there are `changed_inputs`; with `resume_anyway`, print a warning instead."""
    if not changed:
        return
    message = "these inputs have changed since the run began:\n  " + "\n  ".join(changed)
    if not config.resume_anyway:
        raise UserError(
            f"resume={config.resume}: {message}\nPut back what was there, start a new run, or resume nevertheless with "
            "resume_anyway=true"
        )
    rank0_print(f"WARNING: {message}")


def check_models_unchanged(
    config: DictConfig, checkpoints: list[str | None], models: dict[str, str], given: Collection[str] = ()
):
    """Refuse checkpoints if the models that their run began with have changed.

    Args:
        models: today's fingerprints of files, or commits on the hub.
        given: keys on the command line, which may name other models than the run's.

    Raises: UserError naming what has changed.
    """
    models = {key: digest for key, digest in models.items() if key not in given}
    for checkpoint in filter(None, checkpoints):
        former = read_state_json(checkpoint).get("inputs", {})
        if changed := _as_lines(config, former, models):
            raise UserError(
                f"{checkpoint}: these inputs have changed since its run began:\n  " + "\n  ".join(changed) + "\n"
                "Put back what was there; a key given on the command line chooses another model"
            )


@contextlib.contextmanager
def resume_hinted(run_dir: str, error_class: type[Exception]) -> Iterator[None]:
    """Add a note on how to resume the run to errors of this class."""
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
    """Return the directories of the requested checkpoints of a run, by name or all; without a run, [None].

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
