"""What a launcher's variables say of this process. Nothing here communicates.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; so do scripts/slurm.sh, and `launch.py` for the
workers that it starts.
"""

import os
import re

import torch

from utils import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether this process is one of several that a launcher, or `launch.run_workers`, has started."""
    return "RANK" in os.environ


def is_launched_by_user() -> bool:
    """Whether it was a launcher that the user has started, not `launch.run_workers`."""
    return is_launched() and "DPO_STARTED_BY" not in os.environ


def is_local_rank0() -> bool:
    """Whether this is its machine's first process, which does what is to be done once a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_variables():
    """Raises UserError if what a launcher has set can't be: a variable is missing, or no number in its range."""
    if missing := ", ".join(name for name in VARIABLES if not os.environ.get(name)):
        raise UserError(f"RANK is set, but not {missing}: a launcher sets {', '.join(VARIABLES)}, or none of them")
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ[name]
        if not re.fullmatch("0|[1-9][0-9]{0,8}", value):
            raise UserError(f"{name}={value}, set by the launcher: must be a whole number, 0 or more")
        numbers[name] = int(value)
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise UserError(f"MASTER_PORT={numbers['MASTER_PORT']}, set by the launcher: must be a port, 1 to 65535")
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(
            f"RANK={numbers['RANK']}, WORLD_SIZE={numbers['WORLD_SIZE']}, set by the launcher: ranks begin at 0 and "
            "stay below the number of workers"
        )
    if numbers["LOCAL_RANK"] > numbers["RANK"]:
        raise UserError(
            f"LOCAL_RANK={numbers['LOCAL_RANK']}, RANK={numbers['RANK']}, set by the launcher: a machine's workers are "
            "numbered from 0, and among all workers in the same order, machine after machine"
        )


def get_world_size(starts_workers: bool, asked: int | None) -> int:
    """How many processes a run has, on all machines.

    Args:
        starts_workers: whether its strategy trains in several.
        asked: the config's `world_size`; None: one for each GPU.
    """
    if is_launched():
        return int(os.environ["WORLD_SIZE"])
    return (asked or torch.cuda.device_count() or 1) if starts_workers else 1
