"""Train a language model with SFT, DPO or IPO: `python train.py model=tiny datasets=[toy] loss=sft`."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from checkpointing.preemption import EXIT_CODE, Stopped
from checkpointing.resume import check_same_run, find_checkpoint, locate_run, locked, resume_hint
from configuration import CONFIG_DIR, FREE_KEYS, REPOSITORY, check_config, explain_hydra_error
from distributed import collectives, environment, launch
from distributed.strategies import STRATEGIES
from utils import UserError, get_local_run_dir, on_rank0, rank0_print

# asked for by HYDRA_FULL_ERROR=1, which `main` then sets for reasons of its own; workers ask their parent's
SHOWS_TRACEBACK = os.environ.setdefault("DPO_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"

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
    """Check the config, then train: in this process, in several that it starts, or as one of a launcher's."""
    run_dir_given = "get_local_run_dir:" not in OmegaConf.to_container(config, resolve=False)["local_run_dir"]
    OmegaConf.resolve(config)
    with contextlib.ExitStack() as stack:
        if environment.is_launched():
            stack.enter_context(launch.process_group())
        checkpoint = prepare(config, run_dir_given, stack) if on_rank0() else None
        config, checkpoint = collectives.broadcast_object((config, checkpoint))
        starts_workers = STRATEGIES[config.trainer].starts_workers
        if environment.is_launched() or not starts_workers:
            train_from(config, checkpoint)
            return
        world_size = environment.get_world_size(starts_workers, config.world_size)
        with resume_hinted(config.local_run_dir, UserError):
            launch.run_workers(train_as_worker, world_size, config.fsdp_port, config, checkpoint)


def prepare(config: DictConfig, run_dir_given: bool, stack: contextlib.ExitStack) -> str | None:
    """Check the config, lock the run directory for as long as `stack` is entered; returns what to go on from."""
    locate_run(config, run_dir_given)
    reference_dtype_given = OmegaConf.select(config, "model.reference_dtype") is not None
    check_config(config)
    if os.path.isdir(config.local_run_dir):
        stack.enter_context(locked(config.local_run_dir))
    checkpoint = find_checkpoint(config)
    if config.resume is not None:
        check_same_run(config, checkpoint, reference_dtype_given)
    print(OmegaConf.to_yaml(config))
    return checkpoint


def train_as_worker(config: DictConfig, checkpoint: str | None):
    """`train_from` in a worker that `run` has started."""
    with errors_reported(), launch.process_group():
        train_from(config, checkpoint)


def train_from(config: DictConfig, checkpoint: str | None):
    """Load what the run starts with, then the checkpoint if there is one, and train to the end."""
    import trainers
    from models import allow_own_code, load_policy, load_reference

    allow_own_code(config)
    trainer_class = getattr(trainers, config.trainer)
    device_map = trainer_class.strategy_class.device_map
    policy = load_policy(config, device_map) if environment.is_local_rank0() else None
    copied = policy if device_map == "balanced" else None  # on its way to several workers the policy is emptied

    def reference_model() -> nn.Module | None:  # where one is needed
        return load_reference(config, copied, device_map) if environment.is_local_rank0() else None

    trainer = trainer_class(
        policy, config, config.seed, config.local_run_dir, reference_model, *collectives.rank_and_world_size()
    )
    run_dir = config.local_run_dir
    with trainer.stop:
        with resume_hinted(run_dir, Stopped):
            trainer.precompute_reference()
            if checkpoint is not None:
                trainer.resume(checkpoint)
        if trainer.state.complete:
            rank0_print(f"This run is complete: {checkpoint}")
            return
        if on_rank0():
            create_run_dir(config)
        with resume_hinted(run_dir, Exception):
            trainer.train()
            trainer.save()


@contextlib.contextmanager
def resume_hinted(run_dir: str, error_class: type[Exception]) -> Iterator[None]:
    """Let errors of this class that end a run say how to go on with it."""
    try:
        yield
    except error_class as error:
        error.add_note(resume_hint(run_dir))
        raise


def with_free_keys(overrides: list[str]) -> list[str]:
    """The overrides, so marked that Hydra takes keys it doesn't know where names are not ours to know."""
    return [f"++{word}" if word.startswith(FREE_KEYS) else word for word in overrides]


@contextlib.contextmanager
def errors_reported() -> Iterator[None]:
    """Let a user's mistake, a lost connection or a signal end the process with a message, without a traceback."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        launch.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        message = str(error) if isinstance(error, UserError) else explain_hydra_error(error)
        sys.exit("\n".join([f"error: {message}", *getattr(error, "__notes__", [])]))
    except Stopped as stopped:
        rank0_print("\n".join([f"stopped by {stopped}", *getattr(stopped, "__notes__", [])]), file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        is_consequence = launch.is_lost_connection(error)
        if is_consequence and environment.is_local_rank0():
            message = f"error: another worker is gone ({str(error)[:200]}); what it or its launcher printed says why"
            print("\n".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        launch.wait_for_root_cause(error)
        if SHOWS_TRACEBACK or not is_consequence:
            raise
        sys.exit(1)


def main():
    """Run under Hydra. A user's mistake ends with its message alone; HYDRA_FULL_ERROR=1 shows where it was noticed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands every error on as it is
    sys.argv[1:] = with_free_keys(sys.argv[1:])
    with errors_reported():
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(run)()


if __name__ == "__main__":
    main()
