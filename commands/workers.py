"""Where a command's work is done: in this process, in workers that it starts, or as one of a launcher's."""

import contextlib
from collections.abc import Callable

from omegaconf import DictConfig

from commands.errors import errors_reported
from commands.output import keep_output_going
from data.prepared import ROWS
from distributed import environment, launch
from distributed.strategies import STRATEGIES


def enter_process_group(config: DictConfig, stack: contextlib.ExitStack):
    """Connect this process with the others, if a launcher has started it, for as long as `stack` is entered."""
    if environment.is_launched():
        stack.enter_context(launch.process_group(config.worker_timeout))


def start_workers_or(work: Callable, config: DictConfig, *args):
    """`work(config, *args)` in the workers that the trainer needs, or here if a launcher has started them or there is
    one process alone."""
    starts_workers = STRATEGIES[config.trainer].starts_workers
    if environment.is_launched() or not starts_workers:
        work(config, *args)
        return
    world_size = environment.get_world_size(starts_workers, config.world_size)
    launch.run_workers(_as_worker, world_size, config.fsdp_port, ROWS, work, config, *args)


def _as_worker(rows: dict[str, list[dict]], work: Callable, config: DictConfig, *args):
    """`rows`: what `ROWS` holds in the process that has started this one."""
    keep_output_going()
    ROWS.update(rows)
    with errors_reported(), launch.process_group(config.worker_timeout):
        work(config, *args)
