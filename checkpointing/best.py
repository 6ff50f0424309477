"""Which evaluation was the best so far, its checkpoint, and when enough worse ones have followed."""

import os

from omegaconf import DictConfig

from checkpointing.checkpoints import point_to
from checkpointing.train_state import TrainState
from reporting.runs import larger_is_better
from utils import UserError, rank0_print

LINK = "BEST"  # beside LATEST


def judge(state: TrainState, config: DictConfig):
    """Compare the last evaluation with the best one so far, and keep it in `state` if it is better.

    Raises: UserError if it lacks the metric that `keep_best` names.
    """
    metric = config.keep_best or "loss/eval"
    if state.examples == 0:  # of the weights that training starts from
        return
    if metric not in state.metrics:
        raise UserError(f"keep_best={metric}: the evaluation has none. It has: {', '.join(state.metrics)}")
    value, best = state.metrics[metric], state.best.get(metric)
    is_better = best is None or (value > best if larger_is_better(metric) else value < best)
    if is_better:
        state.best, state.best_at, state.worse = {metric: value}, state.examples, 0
    else:
        state.worse += 1


def is_over(state: TrainState, config: DictConfig) -> bool:
    """True if `stop_when_worse` ends the run here."""
    return config.stop_when_worse is not None and state.worse >= config.stop_when_worse


def print_stop_reason(state: TrainState):
    """Say why the run ends before its data does."""
    ((metric, value),) = state.best.items()
    rank0_print(
        f"Ending here: {metric} was best after {state.best_at} examples ({value:.5g}), and {state.worse} evaluations "
        "since were worse"
    )


def should_save_best(state: TrainState, config: DictConfig) -> bool:
    """True if the last evaluation was the best so far and `keep_best` keeps its checkpoint."""
    return config.keep_best is not None and state.best_at == state.examples and state.examples > 0


def point_best(run_dir: str, state: TrainState, config: DictConfig) -> str | None:
    """Make BEST a link to the best checkpoint, if it is there; returns its name."""
    name = f"step-{state.best_at}"
    if config.keep_best not in state.best or not os.path.isdir(os.path.join(run_dir, name)):
        return None
    link = os.path.join(run_dir, LINK)
    if not os.path.islink(link) or os.readlink(link) != name:
        point_to(run_dir, LINK, name)
    return name
