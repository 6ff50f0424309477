"""A run's directory: its default path, and its config.yaml."""

import os
import socket

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from basics.files import atomic_file, write_errors_named
from checkpointing import fingerprints
from utils import get_local_run_dir, rank0_print


def default_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """Return the default of `local_run_dir`: in a sweep the job's directory, otherwise a new path."""
    return HydraConfig.get().runtime.output_dir if in_sweep() else get_local_run_dir(exp_name, local_dirs)


def is_run_dir_given(config: DictConfig) -> bool:
    """True if the user fixed the run directory, rather than the timestamped default."""
    if "get_local_run_dir:" not in str(OmegaConf.to_container(config, resolve=False)["local_run_dir"]):
        return True
    return in_sweep() and any(word.startswith("hydra.sweep.dir=") for word in HydraConfig.get().overrides.hydra)


def create_run_dir(config: DictConfig, inputs: dict[str, str] | None = None):
    """Create the run directory with its config.yaml; before that, only caches and a lock are written.

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
