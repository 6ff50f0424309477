"""Paths in a config: `~` is the user's home directory, which only shells expand otherwise; see also `basics.links`."""

import os

from omegaconf import DictConfig, ListConfig, OmegaConf

from basics.errors import UserError
from basics.links import followed

_KEYS = (
    "model.name_or_path", "model.tokenizer_name_or_path", "model.archive", "model.adapter", "local_run_dir", "resume",
    "reference_model.name_or_path", "reference_model.archive", "reference_model.adapter", "chat_template", "local_dirs",
    "dataset_paths", "datasets",
)  # fmt: skip
# keys of the other commands; values that aren't paths don't begin with ~/
_OWN_KEYS = (
    "run", "rows", "output", "prompts", "alpaca_eval", "a", "b", "judge_model", "judge_prompt", "chat_template",
    "local_dirs",
)  # fmt: skip


def expand_config(config: DictConfig):
    """Expand `~` in every path of training's config, in place."""
    for key in _KEYS:
        value = OmegaConf.select(config, key)
        if value is not None:
            OmegaConf.update(config, key, _expanded(value), merge=False)


def expand_home(own: dict) -> dict:
    """Return the values of a command's own keys, `~` expanded in those that are paths.

    Raises: UserError if a path is empty, as `output=$FILE` is where there is no such variable.
    """
    if empty := [key for key in _OWN_KEYS if own.get(key) == ""]:
        raise UserError(f"{empty[0]}= is empty: give a path, or leave it out")
    return {key: _expanded(value) if key in _OWN_KEYS else value for key, value in own.items()}


def _expanded(value: object) -> object:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if not isinstance(value, str):
        return value
    return followed(os.path.expanduser(value) if value.startswith("~") else value)
