"""The config of evaluate.py and sample.py: that of a run, or of training, with keys of their own beside it."""

import contextlib
import os
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from commands.workers import enter_process_group, needs_workers, run_in_workers
from config_checks.checks import check_config
from config_checks.schema import own_keys
from distributed import collectives
from utils import UserError, closest_match, on_rank0


def config_without(config: DictConfig, own: dict) -> DictConfig:
    """The config of training beneath one that has keys of its own, the run's where `run` is among them.

    Raises: UserError if there is no such run, or its config can't be read.
    """
    with open_dict(config):
        for key in own:
            del config[key]
    if own["run"] is not None:
        config = _config_of_run(config, str(own["run"]), own)
    else:
        OmegaConf.to_container(config, resolve=True)
        OmegaConf.resolve(config)
    for key, value in {"resume": None, "save_optimizer": False, "wandb.enabled": False, "debug": False}.items():
        OmegaConf.update(config, key, value)
    return config


def _config_of_run(config: DictConfig, run_dir: str, own: dict) -> DictConfig:
    """The config of a run, with what the command line gives in place of what is there.

    Args:
        config: composed from the command line and the defaults.

    Raises: UserError if there is no such run, or its config can't be read.
    """
    path = os.path.join(run_dir, "config.yaml")
    if not os.path.isfile(path):
        parent = os.path.dirname(run_dir.rstrip("/")) or "."
        siblings = [os.path.join(parent, name) for name in os.listdir(parent)] if os.path.isdir(parent) else []
        raise UserError(f"run={run_dir}: no run there, as it has no config.yaml.{closest_match(run_dir, siblings)}")
    try:
        former = OmegaConf.load(path)
        if not isinstance(former, DictConfig):
            raise ValueError("it holds no keys")
    except Exception as error:  # of the YAML library, whatever it is
        raise UserError(f"{path}: can't read it: {' '.join(str(error).split())[:300]}") from error
    parser = OverridesParser.create()
    given = [parser.parse_override(word).key_or_group for word in HydraConfig.get().overrides.task]
    result = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # keys that are newer than the run
    with open_dict(result):
        for key, value in OmegaConf.to_container(former, resolve=False).items():
            result[key] = value
        for key in given:
            if key.split(".")[0] not in own:
                OmegaConf.update(result, key, OmegaConf.select(config, key, throw_on_missing=True), merge=False)
        result.local_run_dir = run_dir
    OmegaConf.resolve(result)
    return result


def run_with_options(config: DictConfig, config_name: str, make_options: Callable, work: Callable):
    """`work(config, options)`: in this process, in several that it starts, or as one of a launcher's.

    Args:
        config_name: of the file whose keys stand beside those of training.
        make_options: options of the config of training and the values of these keys; what it raises ends all.
    """
    own = {key: OmegaConf.to_container(config)[key] for key in own_keys(config_name)}
    config = config_without(config, own)
    with contextlib.ExitStack() as stack:
        enter_process_group(config, stack)
        prepared = None
        if on_rank0():
            check_config(config, reads_data=own.get("prompts") is None)
            prepared = config, make_options(config, own)
        config, options = collectives.broadcast_object(prepared)
        run_in_workers(work, config, options) if needs_workers(config) else work(config, options)
