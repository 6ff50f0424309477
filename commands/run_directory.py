"""A run's directory: its name, its lock, its config.yaml."""

import contextlib
import hashlib
import json
import os
import re
import socket

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from basics.files import atomic_file, write_errors_named
from basics.locks import locked_directory
from checkpointing import fingerprints
from checkpointing.resume import SWEEP
from utils import get_local_run_dir, rank0_print


def locked_run(run_dir: str) -> contextlib.AbstractContextManager:
    """Hold a run directory for this process alone; see `locked_directory`.

    Raises: UserError if another process holds it, naming it, or if the directory can't be read and written.
    """
    return locked_directory(run_dir, f"local_run_dir={run_dir}", "another process is running this run")


def default_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """Return the default of `local_run_dir`: a new path, or in a sweep the job's directory."""
    return HydraConfig.get().runtime.output_dir if in_sweep() else get_local_run_dir(exp_name, local_dirs)


def is_run_dir_given(config: DictConfig) -> bool:
    """True if the user fixed the run directory, rather than the timestamped default."""
    if "get_local_run_dir:" not in str(OmegaConf.to_container(config, resolve=False)["local_run_dir"]):
        return True
    return in_sweep() and any(word.startswith("hydra.sweep.dir=") for word in HydraConfig.get().overrides.hydra)


def create_run_dir(config: DictConfig, inputs: dict[str, str] | None = None):
    """Create the run directory with its config.yaml; before this only caches and a lock are written.

    Args:
        inputs: fingerprints of what the run starts from.
    """
    with write_errors_named(config.local_run_dir):
        os.makedirs(config.local_run_dir, exist_ok=True)
    with atomic_file(os.path.join(config.local_run_dir, "config.yaml")) as file:
        file.write(fingerprints.header(inputs or {}) + OmegaConf.to_yaml(config))
    rule = "=" * 80
    rank0_print(f"{rule}\nWriting to {socket.gethostname()}:{config.local_run_dir}\n{rule}")


def in_sweep() -> bool:
    """True in a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job_name() -> str:
    """Return the job's overrides as the name of a directory, whose path can be typed in an override."""
    overrides = [f"{key}-{value}" for key, value in job_overrides().items()]
    name = re.sub(r"[^\w.+-]+", "_", "_".join(overrides)) or f"job_{OmegaConf.select(HydraConfig.get(), 'job.num')}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def job_overrides() -> dict[str, str]:
    """Return what the sweep varies, with this job's values: {'loss.beta': '0.1', ...}."""
    job, fixed = parsed(HydraConfig.get().overrides.task), sweep_values()["fixed"]
    return {o.key_or_group: o.get_value_element_as_str() for o in job if o.key_or_group not in fixed}


def fixed_keys(config: DictConfig) -> list[str]:
    """Return the keys to which a sweep's command line gives one value for all jobs.

    Args:
        config: the sweep's, with Hydra's own keys.
    """
    given = parsed(config.hydra.overrides.task)
    varied = {*(config.hydra.sweeper.get("params") or {}), *(o.key_or_group for o in given if o.is_sweep_override())}
    return sorted({o.key_or_group for o in given} - varied)


def sweep_values() -> dict:
    """Return the `id` of the sweep that this process is part of, and its `fixed_keys`."""
    return json.loads(os.environ.get(SWEEP, '{"id": null, "fixed": []}'))


def parsed(words: ListConfig) -> list[Override]:
    """Parse overrides."""
    return OverridesParser.create().parse_overrides(OmegaConf.to_container(words))


_LONGEST_NAME = 150  # characters; file systems take 255 bytes
