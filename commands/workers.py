"""Start workers or join a launcher's: where a command's work is done."""

import contextlib
from collections.abc import Callable

from omegaconf import DictConfig

from commands.errors import errors_reported
from commands.exit_on_signals import exit_on_signals
from commands.output import keep_output_going
from data.row_sources import ROWS
from distributed import connection, environment, launch
from distributed.strategies import STRATEGIES


def launched_group(config: DictConfig) -> contextlib.AbstractContextManager:
    """Join the process group of the other workers if a launcher started this process; otherwise do nothing."""
    is_launched = environment.is_launched()
    return connection.process_group(config.worker_timeout) if is_launched else contextlib.nullcontext()


def run_in_workers(work: Callable, config: DictConfig, *args):
    """Call `work(config, *args)`: in new workers if the trainer needs some and no launcher started any, else here."""
    if environment.is_launched() or not STRATEGIES[config.trainer].starts_workers:
        work(config, *args)
        return
    world_size = environment.get_world_size(True, config.world_size)
    launch.run_workers(_as_worker, world_size, config.fsdp_port, ROWS, work, config, *args)


def _as_worker(rows: dict[str, list[dict]], work: Callable, config: DictConfig, *args):
    """Call `work` in a worker; `rows` is what `ROWS` holds in the process that started it."""
    keep_output_going()
    ROWS.update(rows)
    with errors_reported(), exit_on_signals(), connection.process_group(config.worker_timeout):
        work(config, *args)
