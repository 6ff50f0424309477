"""Check that a run is resumed as the same run: under its config, and from the models and data it began with."""

import os
import re
from collections.abc import Collection

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from basics.outputs import is_sharded
from basics.repository import REPOSITORY
from basics.saved_config import read_saved_config
from checkpointing import fingerprints
from checkpointing.train_state import read_state_json, training_settings, versions
from config_checks.schema import default_config
from data.batches import split_name
from references import resolved_reference
from utils import UserError, rank0_print

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
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, OmegaConfBaseException)


def _former_config(config: DictConfig, checkpoint: str | None) -> dict[str, object] | None:
    """Return the run's earlier config, flat: from the checkpoint, or else from config.yaml; None for a new run."""
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
    former = _former_config(config, checkpoint)
    if former is None:
        return
    if config.model.reference_dtype is None:  # earlier versions had another default
        config.model.reference_dtype = former.get("model.reference_dtype")
    _refuse_changed_keys(config, former, _former_inputs(config, checkpoint), files)
    if checkpoint is not None:
        _check_kind(config, checkpoint)
    refuse_changed_inputs(config, changed_inputs(config, checkpoint, files))
    former_versions = read_state_json(checkpoint).get("versions") if checkpoint else versions()
    if former_versions != versions():
        rank0_print(
            f"WARNING: the run began with {former_versions}, now it has {versions()}: the numbers may differ a little"
        )


def _refuse_changed_keys(
    config: DictConfig, former: dict[str, object], former_inputs: dict[str, str], files: dict[str, str]
):
    """Print the keys that have changed; raise UserError if one of them makes it a different run.

    A key that names a model, data or a commit may change as long as what it names is the same.
    """
    now, defaults = training_settings(config), default_config(config.loss.name)
    former = {**{key: defaults[key] for key in now.keys() & defaults.keys()}, **former}  # keys added since then
    changes = {
        key: f"{key}: {former.get(key, 'absent')} → {now.get(key, 'absent')}"
        for key in sorted(former.keys() | now.keys())
        if former.get(key) != now.get(key)
    }
    if changes:
        rank0_print("Changed since the run began:\n  " + "\n  ".join(changes.values()))
    only_moved = (files.keys() & former_inputs.keys()) - set(fingerprints.changed_models(config, former_inputs, files))
    if former_inputs.get("model.name_or_path", "") == now["model.revision"]:  # the commit is unchanged
        only_moved.add("model.revision")
    # the content of data is compared once it is loaded
    only_moved |= {f"dataset_paths.{name}" for name in config.dataset_paths
                   if split_name(name, "train") in former_inputs}  # fmt: skip
    refused = [change for key, change in changes.items() if key not in _MAY_CHANGE and key not in only_moved]
    if refused and not config.resume_anyway:
        raise UserError(
            f"resume={config.resume}: under this config it would be another run:\n  " + "\n  ".join(refused) + "\n"
            "Give these keys their former values, start a new run (from these weights: model.archive=CHECKPOINT), or "
            "resume anyway with resume_anyway=true"
        )


def _check_kind(config: DictConfig, checkpoint: str):
    """Refuse, even with `resume_anyway`, a checkpoint that lacks what this config needs: adapter, weights or reference.

    Raises: UserError naming the key and the remedy.
    """
    remedy = "leave the key as it was, or start a new run from the checkpoint's weights with"
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
            f"reference_update_every={config.reference_update_every}: {checkpoint} has no reference.pt, because "
            f"the reference of its run never moved; {remedy} model.archive={checkpoint}"
        )


def _holds_reference(checkpoint: str) -> bool:
    if is_sharded(checkpoint):
        from checkpointing.sharded import ShardedCheckpoint  # takes seconds to import

        return bool(ShardedCheckpoint(checkpoint).state_dict("reference"))
    return os.path.exists(os.path.join(checkpoint, "reference.pt"))


def changed_inputs(config: DictConfig, checkpoint: str | None, inputs: dict[str, str]) -> list[str]:
    """List the inputs that have changed since the run began, as lines of a message."""
    return _changed_lines(config, _former_inputs(config, checkpoint), inputs)


def _changed_lines(config: DictConfig, former: dict[str, str], inputs: dict[str, str]) -> list[str]:
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
        raise UserError(f"resume={config.resume}: {message}\nRestore them, start a new run, or give resume_anyway=true")
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
        if changed := _changed_lines(config, former, models):
            raise UserError(
                f"{checkpoint}: these inputs have changed since its run began:\n  " + "\n  ".join(changed) + "\n"
                "Restore them, or choose another model by a key on the command line"
            )
