"""Train a language model with SFT, DPO or another loss: `python train.py model=tiny datasets=[toy] loss=sft`."""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import contextlib
import functools
import textwrap

from omegaconf import DictConfig, OmegaConf

from acceleration.out_of_memory import out_of_memory_explained
from basics.locks import locked_directory
from basics.outputs import Output, check_outputs, refuse_unless_new_run, refuse_unless_resumed_run
from checkpointing import fingerprints
from checkpointing.resume import (
    check_restartable,
    checkpoint_to_resume,
    is_complete,
    is_last,
    locate_run,
    resume_hinted,
)
from checkpointing.same_run import changed_inputs, check_same_run, refuse_changed_inputs
from checkpointing.stop_signal import Stopped
from commands import command_line
from commands.command_line import compose_config  # noqa: F401 (for users: `run(compose_config(...))`)
from commands.run_directory import create_run_dir, in_sweep, is_run_dir_given
from commands.sweeps import job_overrides
from commands.workers import run_in_workers
from config_checks.checks import check_config
from config_checks.datasets import chosen_datasets, hub_names
from config_checks.schema import changed_keys
from distributed import collectives, connection, environment, launch
from optimization import rate_warning
from preference_datasets import open_batches
from reporting.runs import last_evaluation
from utils import UserError, on_rank0, rank0_print


def run(config: DictConfig) -> tuple[dict[str, float], str]:
    """Check the config, then train: in this process, in workers that it starts, or as a worker of torchrun or Slurm.

    Returns: the metrics of the run's last evaluation, and the run directory.
    Raises: UserError with the message that the command line prints.
    """
    if not isinstance(config, DictConfig):
        raise UserError(f"run() got a {type(config).__name__}: give it compose_config('model=NAME', 'loss=dpo', ...)")
    run_dir_given = is_run_dir_given(config)
    OmegaConf.to_container(config, resolve=True)  # if an interpolation fails, this names its key
    OmegaConf.resolve(config)
    if in_sweep() and "exp_name" not in (varied := job_overrides()):  # wandb tells jobs apart by their names
        config.exp_name = " ".join([str(config.exp_name), *(f"{key}={value}" for key, value in varied.items())])
    with contextlib.ExitStack() as stack:
        if environment.is_launched():
            stack.enter_context(connection.process_group(config.worker_timeout))
        checked = (config, *check_and_lock(config, run_dir_given, stack)) if on_rank0() else None
        config, checkpoint, is_finished, file_hashes = collectives.broadcast_object(checked)
        if is_finished:
            rank0_print(f"This run is complete: {checkpoint}")
        elif config.data_only:
            report_data(config)
        elif launch.must_start_workers(config):
            with resume_hinted(config.local_run_dir, UserError):  # killed workers can't print how to resume
                run_in_workers(train_from, config, checkpoint, file_hashes)
        else:
            train_from(config, checkpoint, file_hashes)
        return last_evaluation(config.local_run_dir), config.local_run_dir


def check_and_lock(
    config: DictConfig, run_dir_given: bool, stack: contextlib.ExitStack
) -> tuple[str | None, bool, dict[str, str]]:
    """Check the config, and lock the run directory until `stack` is closed.

    Returns: the checkpoint to resume from, if any; True if the run is already complete; fingerprints of the files that
        the run starts from.
    """
    check_config(config)
    if environment.is_launched_by_user():
        check_restartable(config, run_dir_given)
    if config.resume is not None:
        locate_run(config, run_dir_given)
    origin = f"local_run_dir={config.local_run_dir}"
    stack.enter_context(locked_directory(config.local_run_dir, origin, "another process is running this run"))
    refusal = refuse_unless_new_run if config.resume is None else refuse_unless_resumed_run
    check_outputs([Output("local_run_dir", config.local_run_dir, refusal)])
    checkpoint, file_hashes = None, fingerprints.file_fingerprints(config)
    if config.resume is not None:
        checkpoint = checkpoint_to_resume(config)
        check_same_run(config, checkpoint, file_hashes)
    changed = textwrap.indent(OmegaConf.to_yaml(OmegaConf.create(changed_keys(config))), "  ")
    rank0_print(f"Config keys that differ from the defaults (config.yaml will list all keys):\n{changed}")
    return checkpoint, checkpoint is not None and is_complete(config, checkpoint), file_hashes


def report_data(config: DictConfig):
    """Read and check all data, and print the data report. Only rank 0 does this; no model is loaded."""
    from data import hub
    from models import load_tokenizer, make_remote_code_importable

    if not on_rank0():
        return
    hub.use_cache_if_unreachable(hub_names(config))
    if config.model.trust_remote_code:
        make_remote_code_importable()
    train_batches, _ = open_batches(config, chosen_datasets(config), load_tokenizer(config), config.seed)
    if warning := rate_warning(config, train_batches.n_batches):
        rank0_print(warning)
    rank0_print("data_only=true: nothing is trained")


def train_from(config: DictConfig, checkpoint: str | None, file_hashes: dict[str, str]):
    """Load data, models and, if there is one, the checkpoint; train to the end; save.

    Args:
        file_hashes: fingerprints of the files that the run starts from.
    """
    from checkpointing.restoring import resume_training  # these two take seconds to import
    from trainers import make_trainer

    trainer, run_dir = make_trainer(config), config.local_run_dir
    # the fingerprints of the data, and of models from the hub, are known only now
    trainer.state.inputs = {**file_hashes, **check_loaded(config, checkpoint, trainer)}
    with trainer.stop:
        with resume_hinted(run_dir, Stopped):
            if config.precompute_ref_log_probs:
                trainer.precompute_reference()
            if checkpoint is not None:
                resume_training(trainer, checkpoint)
        if trainer.state.complete and is_last(checkpoint):  # under the current settings, not the saved ones
            rank0_print(f"This run is complete: {checkpoint}")
            return
        if on_rank0():
            create_run_dir(config, trainer.state.inputs)
        with resume_hinted(run_dir, Exception), out_of_memory_explained(config):
            trainer.train()
            trainer.save()


def check_loaded(config: DictConfig, checkpoint: str | None, trainer) -> dict[str, str]:
    """Refuse to resume if the data, or models from the hub, have changed since the run began; rank 0 decides for all.

    Returns: fingerprints of the data and of what was loaded from the hub.
    """
    loaded, changed = {}, []
    if on_rank0():
        loaded = fingerprints.hub_revisions(config)
        loaded |= {**trainer.train_iterator.fingerprints(), **trainer.eval_iterator.fingerprints()}
        changed = changed_inputs(config, checkpoint, loaded) if config.resume is not None else []
    loaded, changed = collectives.broadcast_object((loaded, changed))
    if changed:
        refuse_changed_inputs(config, changed)
    return loaded


main = functools.partial(command_line.main, run, can_sweep=True)

if __name__ == "__main__":
    from train import main  # instead of `__main__.main`, whose functions workers and sweeps could not import by name

    main()
