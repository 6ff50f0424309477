"""The command line of every command: Hydra composes the config, errors become messages, `-m` sweeps."""

import contextlib
import os
import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from basics.interrupts import INTERRUPTED, interrupts_reported
from basics.printing import printable
from basics.repository import REPOSITORY
from checkpointing.stop_signal import EXIT_CODE
from commands import sweeps
from commands.exit_on_signals import exit_on_signals
from commands.output import SHOWS_TRACEBACK, errors_reported, keep_output_going
from commands.run_directory import default_run_dir, in_sweep
from commands.start_again import with_config_of_run
from config_checks.explanations import explain_flags, explain_hydra_error
from config_checks.schema import CONFIG_DIR, FREE_KEYS, names_in
from distributed import launch
from objectives.modifiers import UNLISTED
from utils import UserError, get_local_dir

_MODIFIERS = "|".join(UNLISTED)
# keys that no YAML file lists: those in sections of `FREE_KEYS`, modifiers of a loss, options of the parts of loss=mix
_FREE = re.compile(rf"(?:{'|'.join(FREE_KEYS)}|judge_args|engine_args|loss\.(?:{_MODIFIERS})=|loss\.parts|loss\.\w+\.)")


def for_hydra(words: list[str]) -> list[str]:
    """Rewrite the words of a command line in Hydra's grammar.

    Keys that no YAML file lists get the prefix ++, `model=PATH_OR_ID` is expanded, and so is `~` at the beginning of
    values and of list items.
    """
    words = [part for word in words for part in _with_model_expanded(word)]
    words = [f"++{word}" if _FREE.match(word) else word for word in words]
    home, start = os.path.expanduser("~"), r"""((?<==)["']?)~(?=/|$)|([\[,:]\s*)~(?=/)"""
    return [re.sub(start, lambda match: (match[1] or match[2] or "") + home, word) for word in words]


def _with_model_expanded(word: str) -> list[str]:
    """Replace `model=PATH_OR_ID`, unless config/model has a file of that name, by a blank model with that name."""
    key, _, name = word.partition("=")
    if key != "model" or name in names_in("model") or not ("/" in name or os.path.isdir(name)) or "," in name:
        return [word]
    return ["model=blank_model", f"model.name_or_path={name}"]


def model_label(choice: str, name_or_path: str) -> str:
    """Return the model's part of `exp_name`: its YAML file's name, or for `model=PATH_OR_ID` the path's last part."""
    return choice if choice != "blank_model" else os.path.basename(os.path.abspath(str(name_or_path)))


def compose_config(*overrides: str) -> DictConfig:
    """Return the config that these words would give on the command line: `run(compose_config("model=tiny"))`.

    Raises: UserError for unknown keys and unreadable values.
    """
    words = for_hydra(list(overrides))
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra.compose("config", words, return_hydra_config=True)
    except Exception as error:  # Hydra raises errors of many kinds
        raise UserError(explain_hydra_error(error, words=words)) from error
    HydraConfig.instance().set_config(config)  # for names and directories
    with open_dict(config):
        del config["hydra"]
    return config


OmegaConf.register_new_resolver("get_local_run_dir", default_run_dir, replace=True)
OmegaConf.register_new_resolver("get_local_dir", get_local_dir, replace=True)
OmegaConf.register_new_resolver("model_label", model_label, replace=True)
OmegaConf.register_new_resolver("sweep_job", sweeps.job_name, replace=True)
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


@launch.exit_code_kept()
def main(run: Callable[[DictConfig], None], config_name: str = "config", can_sweep: bool = False):
    """Call `run` with the config that Hydra composes from the command line.

    A user's mistake ends the process with its message alone; HYDRA_FULL_ERROR=1 shows the traceback, too.

    Args:
        run: the command's function; with `can_sweep`, other processes must be able to import it.
        can_sweep: the command accepts `-m`, which runs it once for each combination of values.
    """
    keep_output_going()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra pass every error on unchanged
    if config_name == "config" and any(word.startswith(("--config-path", "-cp")) for word in sys.argv):
        with errors_reported():
            sys.argv[1:] = with_config_of_run(sys.argv[1:])
    sys.argv[1:] = for_hydra(sys.argv[1:])

    def job(config: DictConfig) -> float | None:  # Hydra's launchers may pickle it
        if in_sweep():
            if not can_sweep:
                sys.exit("error: only train.py supports sweeps with -m")
            return sweeps.run_job(run, config)
        # inside the job, because Hydra prints a line of its own above any error that a job raises
        with errors_reported(EXIT_CODE if can_sweep else INTERRUPTED):
            run(config)

    try:
        with interrupts_reported(), contextlib.nullcontext() if can_sweep else exit_on_signals():
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
    except SystemExit as error:
        if error.code == 2:  # raised by Hydra's option parser
            print(printable(explain_flags(sys.argv[1:])), file=sys.stderr)
        raise
    except Exception as error:  # raised while Hydra composes the config; jobs report their own errors
        if SHOWS_TRACEBACK:
            raise
        sys.exit(printable(f"error: {explain_hydra_error(error, config_name)}"))
    finally:
        sweeps.report()
