"""Start a run again from another run's config.yaml: `python train.py --config-path RUN`."""

import os

from hydra.core.override_parser.types import Quote, QuotedString

from basics.saved_config import read_saved_config
from config_checks.schema import changed_keys
from utils import UserError

_OPTIONS = ("--config-path", "-cp")
# what belongs to one run alone; and no file may allow code to be run
_LEFT_OUT = ("resume", "resume_anyway", "data_only", "model.trust_remote_code")


def with_config_of_run(words: list[str]) -> list[str]:
    """Replace `--config-path RUN` by the settings in RUN/config.yaml, as overrides that later ones replace.

    A folder with another kind of config.yaml is left to Hydra.

    Raises: UserError if the file can't be read.
    """
    path, rest = _config_path(words)
    file = path and os.path.join(os.path.expanduser(path), "config.yaml")
    if not file or not os.path.isfile(file):
        return words
    try:
        config = read_saved_config(file)
        if "defaults" in config or not {"model", "loss", "datasets"} <= config.keys():
            return words
        settings = {key: value for key, value in changed_keys(config).items() if key not in _LEFT_OUT}
    except Exception as error:  # the YAML library raises errors of any kind
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--config-path {path}: can't read its config.yaml: {reason}") from error
    given = {word.lstrip("+~").partition("=")[0] for word in rest}
    groups = {"model": "blank_model", "loss": settings.pop("loss.name")}
    settings = {key: value for key, value in settings.items() if key.split(".")[0] not in given & groups.keys()}
    overrides = [f"{group}={name}" for group, name in groups.items() if group not in given]
    overrides += [f"{key}={as_typed(value)}" for key, value in settings.items()]
    first = next((n for n, word in enumerate(rest) if "=" in word and not word.startswith("-")), len(rest))
    return rest[:first] + overrides + rest[first:]  # after Hydra's options


def _config_path(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of Hydra's option, and the other words, without `--config-name config`."""
    path, rest, ahead = None, [], iter(words)
    for word in ahead:
        option, is_joined, value = word.partition("=")
        if option in (*_OPTIONS, "--config-name", "-cn"):
            value = value if is_joined else next(ahead, "")
            if option in _OPTIONS:
                path = value
            elif value.removesuffix(".yaml") != "config":
                return None, words
        else:
            rest.append(word)
    return path, rest


def as_typed(value: object) -> str:
    """Return a value as it is typed in an override of Hydra's."""
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_typed, value)) + "]"
    return "null" if value is None else str(value).lower()
