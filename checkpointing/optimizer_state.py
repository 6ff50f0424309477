"""Load the optimizer's and the scheduler's state from a checkpoint."""

import os

import torch
from omegaconf import DictConfig

from basics.outputs import is_sharded
from checkpointing.archives import read_state_dict
from checkpointing.sharded import ShardedCheckpoint, is_tensor, placed_like
from checkpointing.train_state import BAD_STATE_ERRORS, read_state_json
from utils import UserError, rank0_print


def load_optimizer_state(
    checkpoint: str,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    config: DictConfig,
):
    """Load the states of optimizer and scheduler from a checkpoint; their settings stay those of the config.

    Raises: UserError if the checkpoint has no state for this optimizer, unless `resume_anyway` is true.
    """
    saved, path = read_state_json(checkpoint), os.path.join(checkpoint, "optimizer.pt")
    try:
        if not os.path.exists(path):
            raise ValueError("it was written with save_optimizer=false")
        if saved["optimizer"] != config.optimizer:
            raise ValueError(f"it was saved with optimizer={saved['optimizer']}")
        scheduler_state = read_state_dict(os.path.join(checkpoint, "scheduler.pt"))
        if not all(isinstance(scheduler_state[name], int) for name in ("last_epoch", "_step_count")):
            raise ValueError("its scheduler.pt has no step count")
        state = read_state_dict(path, mmap=True)
        if is_sharded(checkpoint):
            _add_saved_tensors(state, ShardedCheckpoint(checkpoint))
        optimizer.load_state_dict(_sharded(state, optimizer))
        scheduler.load_state_dict(scheduler_state)
    except BAD_STATE_ERRORS as error:
        message = f"{checkpoint} holds no state for optimizer={config.optimizer}: {error}"
        if not config.resume_anyway:
            raise UserError(f"{message}; resume_anyway=true starts with a new one") from error
        rank0_print(f"WARNING: {message}; starting with a new one")
        scheduler.last_epoch = saved["updates"]
    scheduler.base_lrs = [config.lr] * len(optimizer.param_groups)
    for group, scale in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        lr = config.lr * scale(scheduler.last_epoch)
        group.update({**optimizer.defaults, "initial_lr": config.lr, "lr": lr})
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _add_saved_tensors(state: dict, checkpoint: ShardedCheckpoint):
    """Add the tensors, which a sharded checkpoint keeps apart from its optimizer.pt, to the optimizer's state dict."""
    for name, tensor in checkpoint.state_dict("optimizer").items():
        number, _, key = name.partition(".")
        state["state"].setdefault(int(number), {})[key] = tensor


def _sharded(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Return an optimizer's state dict with its tensors sharded as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != sum(len(group["params"]) for group in state["param_groups"]):
        raise ValueError("it has another number of parameters")
    for number, values in state["state"].items():
        shape = parameters[number].shape
        for key, value in values.items():
            if is_tensor(value) and not _fits(value.shape, shape):
                raise ValueError(f"{key} of parameter {number} has the shape {tuple(value.shape)}, not {tuple(shape)}")
    sharded = {
        number: {
            key: placed_like(parameters[number], value).clone() if is_tensor(value) else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": sharded}


def _fits(shape: torch.Size, parameter_shape: torch.Size) -> bool:
    """True if a tensor can belong to a parameter's state: it holds one number, or one per weight, row or column."""
    same_rank = len(shape) == len(parameter_shape)
    return len(shape) == 0 or (same_rank and all(n in (1, m) for n, m in zip(shape, parameter_shape, strict=True)))
