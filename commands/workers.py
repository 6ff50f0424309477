"""Do a command's work in workers."""

from collections.abc import Callable

from omegaconf import DictConfig

from commands.exit_on_signals import exit_on_signals
from commands.output import errors_reported, keep_output_going
from data.row_sources import ROWS
from distributed import connection, environment, launch


def run_in_workers(work: Callable, config: DictConfig, *args):
    """Start the workers that the trainer needs, and call `work(config, *args)` in each."""
    world_size = environment.get_world_size(starts_workers=True, requested=config.world_size)
    launch.run_workers(_as_worker, world_size, config.fsdp_port, ROWS, work, config, *args)


def _as_worker(rows: dict[str, list[dict]], work: Callable, config: DictConfig, *args):
    """Call `work` in a worker; `rows` is the content of `ROWS` in the process that started it."""
    keep_output_going()
    ROWS.update(rows)
    with errors_reported(), exit_on_signals(), connection.process_group(config.worker_timeout):
        work(config, *args)
