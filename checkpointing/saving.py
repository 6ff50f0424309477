"""Save a trainer's state as a checkpoint: whole or sharded, now or in a thread."""

import dataclasses
import os
from collections.abc import Callable

from checkpointing import best
from checkpointing.checkpoints import (
    Contents,
    begin_sharded,
    delete_oldest,
    point_to,
    state_dicts_to_save,
    write_whole,
)
from checkpointing.train_state import TrainState, get_rng_state
from utils import rank0_print


def begin_save(
    trainer, path: str, metrics: dict | None = None, then: Callable[[TrainState], None] = lambda _state: None
):
    """Write a checkpoint; with `checkpoint_async`, only copy its tensors and write it in a thread.

    Args:
        metrics: written in place of those of the last evaluation.
        then: called on rank 0, with the checkpoint's train state, once the checkpoint is on disk.
    """
    config = trainer.config
    if config.debug:
        rank0_print("skipping save in debug mode")
        return
    trainer.background.wait()  # the checkpoint before this one
    optimizers = {"optimizer": trainer.optimizer, "scheduler": trainer.scheduler} if config.save_optimizer else {}
    reference = trainer.reference.model if trainer.moves_reference else None
    state_dicts, state = state_dicts_to_save(trainer.policy, reference, **optimizers), _current_state(trainer)
    if metrics is not None:
        state = dataclasses.replace(state, metrics=metrics)
    contents = Contents(
        trainer.policy, trainer.tokenizer, state_dicts, state, config, trainer.dropout_rates, trainer.n_eval_examples
    )  # fmt: skip
    if config.checkpoint_format == "whole":
        write_whole(path, contents, then)
    elif config.checkpoint_async:
        trainer.background.start(begin_sharded(path, contents, then))
    else:
        begin_sharded(path, contents, then)()


def _current_state(trainer) -> TrainState:
    """Return the trainer's train state with all that a checkpoint adds: random generators, sizes of logs and so on."""
    return dataclasses.replace(
        trainer.state,
        complete=is_over(trainer) and trainer.state.evaluated_at == trainer.state.examples,
        max_tokens=trainer.max_tokens,
        loss_memory={name: float(average) for name, average in trainer.loss_memory.averages.items()},
        rng_states=trainer.strategy.gather_shards(get_rng_state()),
        **(trainer.run_log.train_state_fields() if trainer.run_log else {}),
    )


def is_over(trainer) -> bool:
    """True if no step is left, or if the run stops early."""
    return trainer.state.batches == trainer.train_iterator.n_batches or best.stops_early(trainer.state, trainer.config)


def save_step(trainer):
    """Write step-N, make LATEST a link to it, and delete the checkpoints that `keep_checkpoints` drops."""
    trainer.state.saved_at = trainer.state.examples
    name = f"step-{trainer.state.examples}"

    def link(state: TrainState):
        point_to(trainer.run_dir, "LATEST", name)
        best.point_best(trainer.run_dir, state, trainer.config)
        delete_oldest(trainer.run_dir, trainer.config.keep_checkpoints, state.examples)

    begin_save(trainer, os.path.join(trainer.run_dir, name), then=link)
