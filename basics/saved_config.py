"""Read the config.yaml of a run safely, even if the run comes from a stranger."""

import yaml
from omegaconf import DictConfig, OmegaConf

_MOST_CHARACTERS = 1_000_000


def read_saved_config(path: str) -> DictConfig:
    """Read a run's config.yaml.

    Runs write only plain values. Interpolations and YAML aliases are refused: an interpolation could read this
    process's environment, and aliases of aliases can expand to any size.

    Raises: OSError; yaml.YAMLError; ValueError if it is refused or holds no keys.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read(_MOST_CHARACTERS + 1)
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it is longer than {_MOST_CHARACTERS:,} characters")
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise ValueError(f"line {token.start_mark.line + 1} has a YAML alias; a run's config has none")
        if isinstance(token, yaml.ScalarToken) and "${" in token.value:
            raise ValueError(f"line {token.start_mark.line + 1} has an interpolation; a run's config has values only")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ValueError("it holds no keys")
    return config


def flatten(config: dict | DictConfig, prefix: str = "") -> dict[str, object]:
    """Return a config's values by their full keys: {'loss.beta': 0.1, ...}."""
    flat = {}
    for key, value in (OmegaConf.to_container(config) if isinstance(config, DictConfig) else config).items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
