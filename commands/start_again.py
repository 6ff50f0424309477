"""Start a run again from another run's config.yaml: `python train.py --config-path RUN`."""

import os

from basics.printing import one_line
from basics.saved_config import read_saved_config
from config_checks.overrides import override_value
from config_checks.schema import changed_keys
from utils import UserError

_PATH, _NAME = ("--config-path", "-cp"), ("--config-name", "-cn")  # Hydra's options
# keys that belong to one run, and a key that no file may set, because it allows code to run
_LEFT_OUT = ("resume", "resume_anyway", "data_only", "model.trust_remote_code")


def with_config_of_run(words: list[str]) -> list[str]:
    """Replace `--config-path RUN` by the settings in RUN/config.yaml, as overrides before all others.

    If it names a folder that isn't a run's, Hydra handles the option.

    Raises: UserError if the file can't be read.
    """
    path, name, rest = _config_options(words)
    file = os.path.join(os.path.expanduser(path), "config.yaml")
    if not path or name.removesuffix(".yaml") != "config" or not os.path.isfile(file):
        return words
    try:
        config = read_saved_config(file)
        if "defaults" in config or not {"model", "loss", "datasets"} <= config.keys():
            return words
        settings = {key: value for key, value in changed_keys(config).items() if key not in _LEFT_OUT}
    except Exception as error:  # the YAML library raises errors of any kind
        raise UserError(f"--config-path {path}: can't read its config.yaml: {one_line(error)}") from error
    given = {word.lstrip("+~").partition("=")[0] for word in rest}
    groups = {"model": "blank_model", "loss": settings.pop("loss.name")}
    settings = {key: value for key, value in settings.items() if key.split(".")[0] not in given & groups.keys()}
    overrides = [f"{group}={name}" for group, name in groups.items() if group not in given]
    overrides += [f"{key}={override_value(value)}" for key, value in settings.items()]
    first = next((n for n, word in enumerate(rest) if "=" in word and not word.startswith("-")), len(rest))
    return rest[:first] + overrides + rest[first:]  # after Hydra's options


def _config_options(words: list[str]) -> tuple[str, str, list[str]]:
    """Return the values of Hydra's two options, and the other words.

    Not by argparse: it would read another option of Hydra's, `-c`, as an abbreviation of these.
    """
    path, name, rest, ahead = "", "config", [], iter(words)
    for word in ahead:
        option, is_joined, value = word.partition("=")
        if option not in _PATH + _NAME:
            rest.append(word)
            continue
        value = value if is_joined else next(ahead, "")
        path, name = (value, name) if option in _PATH else (path, value)
    return path, name, rest
