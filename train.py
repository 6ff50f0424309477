"""Train a language model with SFT, DPO or IPO: `python train.py model=tiny datasets=[toy] loss=sft`."""

import contextlib
import functools
import os
import socket
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configuration import REPOSITORY, check_config, explain_hydra_error
from resume import EXIT_CODE, Stopped, check_same_run, claimed, find_checkpoint, how_to_go_on, locate_run
from utils import UserError, get_local_run_dir

OmegaConf.register_new_resolver("get_local_run_dir", get_local_run_dir, replace=True)
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


def create_run_dir(config: DictConfig):
    """Create the run directory with the config in it; nothing before this writes anything but caches."""
    path = os.path.join(config.local_run_dir, "config.yaml")
    try:
        os.makedirs(config.local_run_dir, exist_ok=True)
        OmegaConf.save(config, f"{path}.partial-new")
        os.replace(f"{path}.partial-new", path)
    except OSError as error:
        raise UserError(f"local_run_dir={config.local_run_dir}: can't write there: {error}") from error
    print("=" * 80)
    print(f"Writing to {socket.gethostname()}:{config.local_run_dir}")
    print("=" * 80, flush=True)


def run(config: DictConfig):
    """Check the config, load the models, train and save."""
    run_dir_given = "get_local_run_dir:" not in OmegaConf.to_container(config, resolve=False)["local_run_dir"]
    OmegaConf.resolve(config)
    locate_run(config, run_dir_given)
    check_config(config)
    with contextlib.ExitStack() as stack:
        if os.path.isdir(config.local_run_dir):
            stack.enter_context(claimed(config.local_run_dir))
        checkpoint = find_checkpoint(config)
        if config.resume is not None:
            check_same_run(config, checkpoint)
        print(OmegaConf.to_yaml(config))
        train_from(config, checkpoint)


def train_from(config: DictConfig, checkpoint: str | None):
    """Load what the run starts with, then the checkpoint if there is one, and train to the end."""
    import trainers
    from checkpoints import load_policy, load_reference

    policy = load_policy(config)
    reference_model = functools.partial(load_reference, config, policy)  # where one is needed
    trainer_class = getattr(trainers, config.trainer)
    trainer = trainer_class(policy, config, config.seed, config.local_run_dir, reference_model=reference_model)
    if checkpoint is not None:  # now that the reference has been made of the starting weights
        trainer.resume(checkpoint)
    if trainer.is_complete:
        print(f"This run is complete: {checkpoint}")
        return
    create_run_dir(config)
    try:
        with trainer.stop:
            trainer.train()
            trainer.save()
    except Exception as error:
        error.add_note(how_to_go_on(config.local_run_dir))
        raise


def with_free_keys(overrides: list[str]) -> list[str]:
    """The overrides, so marked that Hydra takes keys it doesn't know where they are an optimizer's or PEFT's own."""
    return [f"++{word}" if word.startswith(("optimizer_args", "lora")) else word for word in overrides]


def main():
    """Run under Hydra. A user's mistake ends with its message alone; HYDRA_FULL_ERROR=1 shows where it was noticed."""
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands every error on as it is
    sys.argv[1:] = with_free_keys(sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path="config", config_name="config")(run)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        message = str(error) if isinstance(error, UserError) else explain_hydra_error(error)
        sys.exit("\n".join([f"error: {message}", *getattr(error, "__notes__", [])]))
    except Stopped as stopped:
        print("\n".join([f"stopped by {stopped}", *stopped.__notes__]), file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
