"""Keys that a config may have, with their defaults."""

import copy
import functools
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from losses import LOSSES
from reporting import runs

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPOSITORY / "config"
# sections whose names are not ours: PEFT's, an optimizer's, a schedule's, those of datasets
FREE_KEYS = ("lora", "optimizer_args", "lr_scheduler_args", "dataset_paths", "fields")


def default_config(loss_name: str | None = None) -> dict[str, object]:
    """Return every key a config may have, with its default: {'lr': 5e-7, 'loss.beta': 0.1, ...}.

    Args:
        loss_name: leave out the options of other losses; those of the parts of `mix` have no defaults here.
    """
    flat = copy.deepcopy(_defaults_in_files())
    losses = LOSSES.values() if loss_name is None else [LOSSES[loss_name]] if loss_name in LOSSES else []
    for loss in losses:
        flat |= {f"loss.{name}": option.default for name, option in loss.options.items()}
    return flat


@functools.cache
def _defaults_in_files() -> dict[str, object]:
    flat = flatten(OmegaConf.load(CONFIG_DIR / "config.yaml"))
    flat |= flatten(OmegaConf.load(CONFIG_DIR / "model/blank_model.yaml"), "model.")
    return {key: value for key, value in flat.items() if not key.startswith(("hydra", "defaults"))}


def changed_keys(config: DictConfig) -> dict[str, object]:
    """Return the keys that differ from the defaults, but for the run's directories: {'lr': 1e-5, ...}."""
    defaults = default_config(config.loss.name)
    flat = flatten(config)
    return {
        key: value
        for key, value in flat.items()
        if key not in ("local_run_dir", "local_dirs") and (key not in defaults or value != defaults[key])
    }


def own_keys(config_name: str) -> dict[str, object]:
    """Return the keys that config/<config_name>.yaml has itself, with their defaults."""
    own = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml"))
    return {key: value for key, value in own.items() if key not in ("hydra", "defaults")}


def flatten(config: DictConfig, prefix: str = "") -> dict[str, object]:
    """Return a config with one level of keys: {'loss.beta': 0.1, ...}."""
    return runs.flatten(OmegaConf.to_container(config, resolve=False), prefix)


def names_in(group: str) -> list[str]:
    """Return the names that `GROUP=NAME` takes."""
    return sorted(path.stem for path in CONFIG_DIR.glob(f"{group}/*.yaml"))
