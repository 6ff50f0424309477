"""Keep track of the best evaluation and its checkpoint, and stop a run early after enough worse evaluations."""

import os

from omegaconf import DictConfig

from basics.links import link_target
from basics.printing import counted
from checkpointing.checkpoints import point_to
from checkpointing.train_state import TrainState
from reporting.metric_names import LOSS, larger_is_better
from utils import UserError, rank0_print

LINK = "BEST"  # beside LATEST


def record_evaluation(state: TrainState, config: DictConfig):
    """Record the last evaluation in `state`: as the new best, or as one more that is worse.

    Raises: UserError if the evaluation lacks the metric that `keep_best` names.
    """
    metric = config.keep_best or LOSS
    if metric not in state.metrics:
        raise UserError(f"keep_best={metric}: the evaluation lacks this metric. It has: {', '.join(state.metrics)}")
    value, best = state.metrics[metric], state.best.get(metric)
    is_better = best is None or (value > best if larger_is_better(metric) else value < best)
    if is_better:
        state.best, state.best_at, state.worse = {metric: value}, state.examples, 0
    else:
        state.worse += 1


def stops_early(state: TrainState, config: DictConfig) -> bool:
    """True if `stop_when_worse` evaluations in a row were worse, by the metric that `keep_best` names now."""
    is_counted = (config.keep_best or LOSS) in state.best
    return config.stop_when_worse is not None and is_counted and state.worse >= config.stop_when_worse


def print_stop_reason(state: TrainState):
    """Print why the run stops early."""
    ((metric, value),) = state.best.items()
    rank0_print(
        f"Stopping early: {metric} was best after {counted(state.best_at, 'example')} ({value:.5g}); worse evaluations "
        f"since then: {state.worse}"
    )


def should_save_best(state: TrainState, config: DictConfig) -> bool:
    """True if the last evaluation was the best so far and `keep_best` keeps its checkpoint."""
    return config.keep_best in state.best and state.best_at == state.examples and state.examples > 0


def point_best(run_dir: str, state: TrainState, config: DictConfig):
    """Make BEST a link to the best checkpoint, if `keep_best` keeps it."""
    name, link = f"step-{state.best_at}", os.path.join(run_dir, LINK)
    is_kept = config.keep_best in state.best and os.path.isdir(os.path.join(run_dir, name))
    if is_kept and link_target(link) != name:
        point_to(run_dir, LINK, name)
