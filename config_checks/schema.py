"""The keys that a config may have: their defaults, and which of them hold paths."""

import functools
import os

from omegaconf import DictConfig, ListConfig, OmegaConf

from basics.links import NAMES, followed
from basics.repository import REPOSITORY
from basics.saved_config import flatten
from losses import LOSSES
from utils import UserError

CONFIG_DIR = REPOSITORY / "config"
# sections whose keys are defined elsewhere: by PEFT, optimizers, schedules and datasets
FREE_KEYS = ("lora", "optimizer_args", "lr_scheduler_args", "dataset_paths", "fields")


def default_config(loss_name: str | None = None) -> dict[str, object]:
    """Return every key a config may have, with its default: {'lr': 5e-7, 'loss.beta': 0.1, ...}.

    Args:
        loss_name: leave out the options of other losses, and all options if it is `mix`.
    """
    flat = dict(_defaults_in_files())
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
    """Return the keys that differ from the defaults, except the run's directories: {'lr': 1e-5, ...}."""
    defaults = default_config(config.loss.name)
    flat = flatten(config)
    return {
        key: value
        for key, value in flat.items()
        if key not in ("local_run_dir", "local_dirs") and (key not in defaults or value != defaults[key])
    }


def own_keys(config_name: str) -> dict[str, object]:
    """Return the keys in config/<config_name>.yaml itself, with their defaults."""
    own = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml"))
    return {key: value for key, value in own.items() if key not in ("hydra", "defaults")}


def names_in(group: str) -> list[str]:
    """Return the valid names for `GROUP=NAME`."""
    return sorted(path.stem for path in CONFIG_DIR.glob(f"{group}/*.yaml"))


# ---- paths ----------------------------------------------------------------------------------------------------------

_PATHS = (
    "model.name_or_path", "model.tokenizer_name_or_path", "model.archive", "model.adapter", "local_run_dir", "resume",
    "reference_model.name_or_path", "reference_model.archive", "reference_model.adapter", "chat_template", "local_dirs",
    "dataset_paths", "datasets",
)  # fmt: skip
# keys of the other commands that may hold paths
_OWN_PATHS = (
    "run", "rows", "output", "prompts", "alpaca_eval", "a", "b", "judge_model", "judge_prompt", "chat_template",
    "local_dirs",
)  # fmt: skip


def expand_config(config: DictConfig):
    """Expand `~` in all paths of a training config, in place."""
    for key in _PATHS:
        value = OmegaConf.select(config, key)
        if value is not None:
            OmegaConf.update(config, key, _expanded(value), merge=False)


def expand_home(own: dict) -> dict:
    """Return the values of a command's own keys, with `~` expanded in paths.

    Raises: UserError if a path is empty, as in `output=$FILE` with an unset variable.
    """
    if empty := [key for key in _OWN_PATHS if own.get(key) == ""]:
        raise UserError(f"{empty[0]}= is empty: give a path, or leave it out")
    return {key: _expanded(value) if key in _OWN_PATHS else value for key, value in own.items()}


def _expanded(value: object) -> object:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value) if value.startswith("~") else value
    return followed(path) if any(name in path for name in NAMES) else path
