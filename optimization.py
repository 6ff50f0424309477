"""Make the optimizer (any of torch.optim) and the schedule (any of transformers' that depends on the step only)."""

import inspect
import math
from collections import Counter
from collections.abc import Callable

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from utils import UserError, closest_match, rank0_print

DEFAULT_SCHEDULE = "constant_with_warmup"
_SMALL_FOR_ADAPTERS = 2e-6  # a learning rate at which an adapter hardly moves
_SMALL_IN_16_BITS = 1e-5  # one whose updates are mostly less than half the last digit of a weight
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
    groups = _parameter_groups(parameters, config)
    try:
        probe = nn.Parameter(torch.ones(2, 2, dtype=parameters[0].dtype, device=device))
        probe.grad = torch.ones_like(probe)
        optimizer_class([probe], lr=config.lr, **args).step()  # some settings are refused only here
        return optimizer_class(groups, lr=config.lr, **args)
    except Exception as error:  # the optimizer may raise anything
        settings = f"optimizer={config.optimizer} lr={config.lr} optimizer_args={config.optimizer_args}"
        raise UserError(f"{settings}: {error}") from error


def _parameter_groups(parameters: list[nn.Parameter], config: DictConfig) -> list:
    """Split off the parameters of one dimension, without weight decay, unless `decay_biases_and_norms` is true."""
    if config.decay_biases_and_norms:
        return parameters
    if "weight_decay" not in inspect.signature(getattr(torch.optim, config.optimizer)).parameters:
        raise UserError(f"decay_biases_and_norms=false: {config.optimizer} has no weight_decay; leave it true")
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
    """Let an optimizer update one tensor at a time; all at once (foreach) needs a copy of all of them."""
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
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=_multiplier(config, n_steps))


def count_warmup_steps(config: DictConfig, n_steps: int) -> int:
    """Return the number of warmup steps; a `warmup_steps` between 0 and 1 is a fraction of the run's `n_steps`."""
    return math.ceil(config.warmup_steps * n_steps) if 0 < config.warmup_steps < 1 else int(config.warmup_steps)


def rate_warning(config: DictConfig, n_steps: int) -> str | None:
    """Warn of a run whose learning rate stays below `lr`, or is too small to change its weights; None otherwise."""
    multiplier = _multiplier(config, n_steps)
    share = max(map(multiplier, range(n_steps)), default=0.0)
    largest, parts = config.lr * share, []
    if share < 0.99:
        is_short = count_warmup_steps(config, n_steps) >= n_steps
        because = f"; warmup_steps={config.warmup_steps} exceeds its {n_steps} steps" if is_short else ""
        parts.append(f"largest learning rate of this run: {largest:.2g}, {share:.0%} of lr={config.lr}{because}")
    rate, dtype = f"lr={config.lr}" if share >= 0.99 else f"{largest:.2g}", config.model.policy_dtype
    if config.lora is not None or config.model.adapter is not None:
        if largest < _SMALL_FOR_ADAPTERS:
            parts.append(f"{rate} hardly moves an adapter: 1e-5 to 1e-4 is usual")
    elif dtype in ("bfloat16", "float16") and largest < _SMALL_IN_16_BITS:
        parts.append(
            f"model.policy_dtype={dtype} rounds most updates of {rate} away (at 5e-7 0.1 % of the weights change): "
            "keep float32 weights and compute in 16 bits, model.policy_dtype=float32 model.policy_mp=bfloat16"
        )
    return f"WARNING: {'; '.join(parts)}" if parts else None


def _multiplier(config: DictConfig, n_steps: int) -> Callable[[int], float]:
    warmup_steps = count_warmup_steps(config, n_steps)
    if config.lr_scheduler == DEFAULT_SCHEDULE:
        return lambda step: min(1.0, (step + 1) / (warmup_steps + 1))  # as the original
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    args = OmegaConf.to_container(config.lr_scheduler_args)
    settings = f"lr_scheduler={config.lr_scheduler} lr_scheduler_args={args} warmup_steps={warmup_steps}"
    try:
        multiplier = _transformers_multiplier(probe, config.lr_scheduler, args, warmup_steps + 1, n_steps + 1)
        checked = {step: multiplier(step + 1) for step in (0, warmup_steps, n_steps // 2, n_steps - 1)}
    except Exception as error:  # the schedule may raise anything
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
    """Return the values of `lr_scheduler`, and the `lr_scheduler_args` of each."""
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
