"""What a launcher's variables say of this process. Nothing here communicates.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; so do scripts/slurm.sh, and `launch.py` for the
workers that it starts.
"""

import os

import torch

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


def get_world_size(starts_workers: bool, asked: int | None) -> int:
    """How many processes a run has, on all machines.

    Args:
        starts_workers: whether its strategy trains in several.
        asked: the config's `world_size`; None: one for each GPU.
    """
    if is_launched():
        return int(os.environ["WORLD_SIZE"])
    return (asked or torch.cuda.device_count() or 1) if starts_workers else 1
