"""The optimizer (any of torch.optim) and the learning rate schedule (any of transformers that depends on the step)."""

import inspect
import math
from collections import Counter
from collections.abc import Callable

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from utils import UserError, closest_match, rank0_print

DEFAULT_SCHEDULE = "constant_with_warmup"
_SET_BY_US = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def make_optimizer(policy: nn.Module, config: DictConfig, device: torch.device, args: dict) -> torch.optim.Optimizer:
    """Make the optimizer of the policy's trained weights.

    Args:
        args: the trainer's arguments; the optimizer gets those that it knows. The config's `optimizer_args` win.

    Raises: UserError if no parameter is trained, or the optimizer refuses its settings.
    """
    rank0_print(f"Using {config.optimizer} optimizer")
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(
            f"lora={config.lora} model.adapter={config.model.adapter}: the model has no trainable parameters"
        )
    optimizer_class = getattr(torch.optim, config.optimizer)
    accepted = inspect.signature(optimizer_class).parameters
    args = {name: value for name, value in args.items() if name in accepted}
    given = set(args) | set(config.optimizer_args)
    if device.type == "cuda" and "fused" in accepted and not given & {"fused", "foreach", "differentiable"}:
        args["fused"] = True  # one kernel for all weights
    args |= OmegaConf.to_container(config.optimizer_args)
    try:
        probe = nn.Parameter(torch.ones(2, 2, dtype=parameters[0].dtype, device=device))
        probe.grad = torch.ones_like(probe)
        optimizer_class([probe], lr=config.lr, **args).step()  # some settings are refused only here
        return optimizer_class(parameters, lr=config.lr, **args)
    except Exception as error:  # whatever the optimizer refuses them with
        settings = f"optimizer={config.optimizer} lr={config.lr} optimizer_args={config.optimizer_args}"
        raise UserError(f"{settings}: {error}") from error


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[torch.device, int]:
    """Return the bytes of the tensors that an optimizer will keep for its weights, on each device.

    Found by a step of the same optimizer on a few weights: RMSprop keeps one number for each, AdamW two.
    """
    n_bytes: Counter[torch.device] = Counter()
    per_weight: dict[torch.dtype, float] = {}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.dtype not in per_weight:
            per_weight[parameter.dtype] = _state_bytes_per_weight(optimizer, parameter.dtype)
        local = getattr(parameter, "_local_tensor", parameter)
        n_bytes[parameter.device] += int(per_weight[parameter.dtype] * local.numel())
    return dict(n_bytes)


def _state_bytes_per_weight(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> float:
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    settings |= dict.fromkeys({"fused", "foreach"} & settings.keys()) | dict.fromkeys(
        {"capturable"} & settings.keys(), False
    )
    probe = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    probing = type(optimizer)([probe], **settings)
    probing.step()
    of_weights = (v for v in probing.state[probe].values() if isinstance(v, torch.Tensor) and v.shape == probe.shape)
    return sum(value.nbytes for value in of_weights) / probe.numel()


def step_one_by_one(optimizer: torch.optim.Optimizer):
    """Let an optimizer change one weight tensor after the other: all at once (foreach) takes a copy of all of them."""
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["foreach"] = False


def steps_by_foreach(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """True if an optimizer's step works on all weights at once, as PyTorch's do by default on a GPU."""
    settings = optimizer.defaults
    is_default = settings.get("foreach", False) is None and not settings.get("fused") and device.type == "cuda"
    return is_default and not settings.get("differentiable")


def make_scheduler(optimizer: torch.optim.Optimizer, config: DictConfig, n_steps: int):
    """Make a LambdaLR whose multiplier of `lr` depends on the step alone.

    Raises: UserError if the multiplier is no finite number of 0 or more at one of the `n_steps` steps.
    """
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=_multiplier(optimizer, config, n_steps))


def _multiplier(optimizer: torch.optim.Optimizer, config: DictConfig, n_steps: int) -> Callable[[int], float]:
    warmup_steps = config.warmup_steps
    if config.lr_scheduler == DEFAULT_SCHEDULE:
        return lambda step: min(1.0, (step + 1) / (warmup_steps + 1))  # as the original
    probe = type(optimizer)([nn.Parameter(torch.zeros(1))], lr=config.lr)  # schedules change their optimizer's rate
    args = OmegaConf.to_container(config.lr_scheduler_args)
    settings = f"lr_scheduler={config.lr_scheduler} lr_scheduler_args={args} warmup_steps={warmup_steps}"
    try:
        multiplier = _transformers_multiplier(probe, config.lr_scheduler, args, warmup_steps + 1, n_steps + 1)
        checked = {step: multiplier(step + 1) for step in (0, warmup_steps, n_steps // 2, n_steps - 1)}
    except Exception as error:  # whatever the schedule refuses them with
        raise UserError(f"{settings}: {error}") from error
    for step, value in checked.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise UserError(f"{settings}: the learning rate would be {config.lr} × {value} at step {step + 1}")
    # count from 1, as the original: otherwise the first step, and the last of a decay to 0, would change nothing
    return lambda step: multiplier(step + 1)


def _transformers_multiplier(
    optimizer: torch.optim.Optimizer, name: str, args: dict, warmup_steps: int, n_steps: int
) -> Callable[[int], float]:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    make = TYPE_TO_SCHEDULER_FUNCTION[name]
    given = {"num_warmup_steps": warmup_steps, "num_training_steps": n_steps}
    accepted = inspect.signature(make).parameters
    scheduler = make(optimizer, **{key: value for key, value in given.items() if key in accepted}, **args)
    return scheduler.lr_lambdas[0]


def schedules() -> dict[str, list[str]]:
    """Return the values of `lr_scheduler`, and the `lr_scheduler_args` that each takes."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    arguments = {}
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        parameters = inspect.signature(function).parameters
        if "kwargs" not in parameters:  # those that take it depend on a metric, not on the step
            arguments[kind.value] = [name for name in parameters if name not in _SET_BY_US]
    return arguments


def check_schedule(name: str, args: dict):
    """Refuse an unknown schedule or unknown arguments of it, with a UserError."""
    if name == DEFAULT_SCHEDULE and not args:
        return  # without Transformers, which takes seconds to import
    known = schedules()
    if name not in known:
        raise UserError(
            f"lr_scheduler={name}: no such schedule.{closest_match(name, known)} There are: {', '.join(known)}"
        )
    for key in args:
        if key not in known[name]:
            hint = " Its warmup is the key warmup_steps." if "warmup_steps" in key else closest_match(key, known[name])
            takes = ", ".join(known[name]) or "none"
            raise UserError(f"lr_scheduler_args.{key}: {name} takes no such argument.{hint} It takes: {takes}")
        if isinstance(args[key], float) and not math.isfinite(args[key]):
            raise UserError(f"lr_scheduler_args.{key}={args[key]}: must be a finite number")
