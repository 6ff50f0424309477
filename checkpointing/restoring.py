"""Restore a trainer from a checkpoint of its run: to resume training, or to evaluate and sample."""

import dataclasses
import math

import torch

from checkpointing.checkpoints import load_model_state, load_policy_state
from checkpointing.optimizer_state import load_optimizer_state
from checkpointing.saving import is_over
from checkpointing.train_state import TrainState
from objectives.declaration import Memory
from utils import UserError, rank0_print


def resume_training(trainer, checkpoint: str):
    """Restore the whole state of training from a checkpoint.

    Raises: UserError if it doesn't fit the model, is beyond the end of training, or has no optimizer state.
    """
    config, state, n_batches = trainer.config, TrainState.load(checkpoint), trainer.train_iterator.n_batches
    trainer.precompute_reference()  # while the policy has its first weights, which the reference may share
    if state.batches > n_batches:
        raise UserError(
            f"{checkpoint} is after step {state.batches}, but n_epochs={config.n_epochs} "
            f"n_examples={config.n_examples} end the run at step {n_batches}"
        )
    rank0_print(f"Resuming from {checkpoint}: {state.examples} examples, {state.updates} steps")
    load_checkpoint(trainer, checkpoint)
    load_optimizer_state(checkpoint, trainer.optimizer, trainer.scheduler, config)
    if config.max_tokens_per_microbatch is None:
        trainer.max_tokens, warning = resumed_cap(state.max_tokens, trainer.max_tokens)
        if warning:
            rank0_print(warning)
    trainer.state.complete = trainer.state.complete and is_over(trainer)


def load_checkpoint(trainer, checkpoint: str):
    """Load the policy, a reference that moves, and the counters."""
    load_policy_state(checkpoint, trainer.policy)
    if trainer.moves_reference:
        load_model_state(checkpoint, "reference", trainer.reference.model)
    trainer.state = dataclasses.replace(TrainState.load(checkpoint), inputs=trainer.state.inputs)
    averages = trainer.state.loss_memory.items()
    trainer.loss_memory = Memory({name: torch.tensor(value, dtype=torch.float64) for name, value in averages})


def resumed_cap(saved: int | None, fitting: int | None) -> tuple[int | None, str | None]:
    """Return the most tokens in a microbatch of a resumed run, and a warning if the run began with another number.

    Free memory varies a little between starts; a larger difference means another GPU.

    Args:
        saved: the number that the run began with.
        fitting: the number for which this GPU has memory.
    """
    if saved is None or fitting is None or saved <= math.ceil(1.1 * fitting):
        return (fitting if saved is None else saved), None
    return fitting, (
        f"WARNING: this GPU has memory for microbatches of {fitting:,} tokens, the run began with {saved:,}: batches "
        "are cut differently, so the weights will differ by rounding"
    )
