"""Configs of commands that work on a run: the run's config, and the command's own keys."""

import contextlib
import os
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from basics.printing import one_line
from basics.saved_config import read_saved_config
from checkpointing import fingerprints
from checkpointing.resume import find_checkpoints
from checkpointing.same_run import check_models_unchanged
from commands.sweeps import parse_overrides
from commands.workers import run_in_workers
from config_checks.checks import check_config
from config_checks.schema import FREE_KEYS, expand_home, own_keys
from distributed import collectives, connection, environment, launch
from utils import UserError, closest_sibling, on_rank0


def read_run_config(run_dir: str) -> DictConfig:
    """Read the config of a run.

    Raises: UserError if there is no such run, or its config can't be read.
    """
    path = os.path.join(run_dir, "config.yaml")
    if not os.path.isfile(path):
        parent, name = os.path.split(os.path.normpath(run_dir))
        if not os.path.exists(run_dir):
            hint = closest_sibling(run_dir)
        elif os.path.isfile(os.path.join(parent, "config.yaml")):
            hint = f" To use a checkpoint, give its run and its name: run={parent or '.'} checkpoint={name}"
        else:
            hint = ""
        raise UserError(f"run={run_dir}: no run there, as it has no config.yaml.{hint}")
    try:
        return read_saved_config(path)
    except Exception as error:  # the YAML library raises errors of any kind
        raise UserError(f"{path}: can't read it: {one_line(error)}") from error


def _given_keys() -> list[str]:
    """Return the keys on the command line."""
    return [override.key_or_group for override in parse_overrides(HydraConfig.get().overrides.task)]


def _training_config(config: DictConfig, own: dict) -> DictConfig:
    """Return the training config, without the command's own keys; with `run`, that run's config and the overrides.

    Raises: UserError if there is no such run, or its config can't be read.
    """
    with open_dict(config):
        for key in own:
            del config[key]
    if own["run"] is not None:
        config = _config_of_run(config, own["run"], own)
    elif OmegaConf.is_missing(config.model, "name_or_path"):
        raise UserError("no model to work on: give a run, run=RUN, or a model, model=NAME")
    else:
        OmegaConf.to_container(config, resolve=True)  # names the key of an interpolation that fails
        OmegaConf.resolve(config)
    for key, value in {"resume": None, "save_optimizer": False, "wandb.enabled": False, "debug": False}.items():
        OmegaConf.update(config, key, value)
    return config


def _config_of_run(config: DictConfig, run_dir: str, own: dict) -> DictConfig:
    """Return a run's config, with the keys given on the command line replaced.

    `model.trust_remote_code` counts only on the command line: a run's config can't allow code to run.

    Args:
        config: composed from the command line and the defaults; supplies keys that the run's config lacks.
    """
    former, given = read_run_config(run_dir), _given_keys()
    merged = OmegaConf.to_container(config, resolve=False)
    for key, value in OmegaConf.to_container(former, resolve=False).items():
        is_section = isinstance(value, dict) and key not in (*FREE_KEYS, "loss")
        merged[key] = {**(merged.get(key) or {}), **value} if is_section else value
    result = OmegaConf.create(merged)
    with open_dict(result):
        if isinstance(result.get("model"), DictConfig) and "model.trust_remote_code" not in given:
            result.model.trust_remote_code = False
        for key in given:
            if key.split(".")[0] not in own:
                OmegaConf.update(result, key, OmegaConf.select(config, key, throw_on_missing=True), merge=False)
        result.local_run_dir = run_dir
    OmegaConf.resolve(result)
    return result


def run_with_options(config: DictConfig, config_name: str, make_options: Callable, work: Callable):
    """Check the config and the options, then call `work(config, options, given)`, in workers if the trainer needs them.

    `given`: the keys on the command line, which only this process knows.

    Args:
        config_name: the config file with the command's own keys.
        make_options: called with the training config, the command's own keys and the checkpoints that they name;
            returns `options`, or raises UserError.
    """
    given = _given_keys()
    own = expand_home({key: OmegaConf.to_container(config)[key] for key in own_keys(config_name)})
    config = _training_config(config, own)
    is_launched = environment.is_launched()
    with connection.process_group(config.worker_timeout) if is_launched else contextlib.nullcontext():
        prepared = None
        if on_rank0():
            check_config(config, reads_data=own.get("prompts") is None)
            checkpoints = find_checkpoints(own["run"], own["checkpoint"])
            if own["run"] is not None:
                files = fingerprints.file_fingerprints(config)
                check_models_unchanged(config, checkpoints, files, given)
            prepared = config, make_options(config, own, checkpoints)
        config, options = collectives.broadcast_object(prepared)
        if launch.must_start_workers(config):
            run_in_workers(work, config, options, given)
        else:
            work(config, options, given)


def check_hub_models(config: DictConfig, checkpoints: list[str | None], given: list[str]):
    """Refuse checkpoints whose run started from other hub commits than those loaded; rank 0 decides for all.

    `given`: the keys on the command line; a model given by one of these keys may differ from the run's model.
    """
    error = None
    if on_rank0():
        try:
            check_models_unchanged(config, checkpoints, fingerprints.hub_revisions(config), given)
        except UserError as refused:
            error = str(refused)
    if (error := collectives.broadcast_object(error)) is not None:
        raise UserError(error)
