"""A process's environment: its place in the run, given by the launcher's variables, and its GPU settings.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. scripts/slurm.sh does the same, and so does
`launch.run_workers` for the workers that it starts. Nothing here communicates.
"""

import os
import re

import torch

from utils import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """True if a launcher or `launch.run_workers` started this process."""
    return "RANK" in os.environ


def is_launched_by_user() -> bool:
    """True if the user's own launcher started this process, rather than `launch.run_workers`."""
    return is_launched() and "DPO_STARTED_BY" not in os.environ


def uses_agent_store() -> bool:
    """True if torchrun's agent has already opened the store in which the workers find each other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def max_restarts() -> int:
    """Return how many times the launcher may restart the command after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) if is_launched_by_user() else 0


def is_local_rank0() -> bool:
    """True for the first process on each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_variables():
    """Raise UserError if one of the launcher's variables is missing, isn't a number or is out of range."""
    if missing := ", ".join(name for name in VARIABLES if not os.environ.get(name)):
        raise UserError(f"RANK is set, but not {missing}: a launcher must set all of {', '.join(VARIABLES)}, or none")
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ[name]
        if not re.fullmatch("0|[1-9][0-9]{0,8}", value):
            raise UserError(f"{name}={value}, set by the launcher: must be an integer, 0 or more")
        numbers[name] = int(value)
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise UserError(f"MASTER_PORT={numbers['MASTER_PORT']}, set by the launcher: must be a port, 1 to 65535")
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(
            f"RANK={numbers['RANK']}, WORLD_SIZE={numbers['WORLD_SIZE']}, set by the launcher: ranks must be numbered "
            "from 0 to WORLD_SIZE - 1"
        )
    if numbers["LOCAL_RANK"] > numbers["RANK"]:
        raise UserError(
            f"LOCAL_RANK={numbers['LOCAL_RANK']}, RANK={numbers['RANK']}, set by the launcher: local ranks must start "
            "from 0 on each machine, and ranks must be numbered in the same order, one machine after the other"
        )


def get_world_size(starts_workers: bool, requested: int | None) -> int:
    """Return the number of processes in the run, over all machines.

    Args:
        starts_workers: True if the run's strategy trains in several processes.
        requested: the config's `world_size`; None means one process per GPU.
    """
    if is_launched():
        return int(os.environ["WORLD_SIZE"])
    return (requested or torch.cuda.device_count() or 1) if starts_workers else 1


# ---- GPU settings ----------------------------------------------------------------------------------------------------


def use_expandable_segments():
    """Let PyTorch's allocator grow its memory segments: fixed ones fragment when every batch has another length.

    Call this before CUDA is first used, because the allocator reads its setting then. The user's own setting is kept.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def use_deterministic_algorithms(use: bool):
    """Use kernels that give the same result every time; operations without such a kernel raise a RuntimeError.

    Call this before cuBLAS is first used, because cuBLAS reads its environment variable then
    (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    if use:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(use)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only useful for finding bugs
