"""Make the optimizer (any class of torch.optim) and the schedule (any of Transformers' that needs no metric)."""

import inspect
import math
from collections.abc import Callable

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from basics.printing import counted
from utils import UserError, rank0_print

DEFAULT_SCHEDULE = "constant_with_warmup"
_SMALL_FOR_ADAPTERS = 2e-6  # a learning rate at which an adapter hardly moves
_SMALL_IN_16_BITS = 1e-5  # below it, most updates of weights in 16 bits round to 0


def make_optimizer(
    policy: nn.Module, config: DictConfig, device: torch.device, strategy_args: dict
) -> torch.optim.Optimizer:
    """Make the optimizer of the policy's trainable weights.

    Args:
        strategy_args: the strategy's default arguments, of which the optimizer gets those that it accepts; the config's
            `optimizer_args` override them.

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
    args = {name: value for name, value in strategy_args.items() if name in accepted}
    given = set(args) | set(config.optimizer_args)
    if device.type == "cuda" and "fused" in accepted and not given & {"fused", "foreach", "differentiable"}:
        args["fused"] = True  # one kernel for all weights
    args |= OmegaConf.to_container(config.optimizer_args)
    groups = parameters if config.decay_biases_and_norms else _with_undecayed(parameters, config)
    try:
        probe = nn.Parameter(torch.ones(2, 2, dtype=parameters[0].dtype, device=device))
        probe.grad = torch.ones_like(probe)
        optimizer_class([probe], lr=config.lr, **args).step()  # some settings are refused only in a step
        return optimizer_class(groups, lr=config.lr, **args)
    except Exception as error:  # the optimizer may raise anything
        settings = f"optimizer={config.optimizer} lr={config.lr} optimizer_args={config.optimizer_args}"
        raise UserError(f"{settings}: {error}") from error


def _with_undecayed(parameters: list[nn.Parameter], config: DictConfig) -> list[dict]:
    """Put biases and norms, the parameters of one dimension, into a group without weight decay."""
    if "weight_decay" not in inspect.signature(getattr(torch.optim, config.optimizer)).parameters:
        raise UserError(f"decay_biases_and_norms=false: {config.optimizer} has no weight_decay; leave it true")
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def count_warmup_steps(config: DictConfig, n_steps: int) -> int:
    """Return the number of warmup steps; `warmup_steps` between 0 and 1 is a fraction of the run's `n_steps`."""
    return math.ceil(config.warmup_steps * n_steps) if 0 < config.warmup_steps < 1 else int(config.warmup_steps)


def rate_warning(config: DictConfig, n_steps: int) -> str | None:
    """Return a warning if the learning rate stays below `lr`, or is too small to change the weights; else None."""
    multiplier = lr_multiplier(config, n_steps)
    share = max(map(multiplier, range(n_steps)), default=0.0)
    largest, parts = config.lr * share, []
    if share < 0.99:
        is_short = count_warmup_steps(config, n_steps) >= n_steps
        steps = counted(n_steps, "step")
        because = f"; the run has only {steps}, and warmup_steps={config.warmup_steps}" if is_short else ""
        parts.append(f"largest learning rate of this run: {largest:.2g}, {share:.0%} of lr={config.lr}{because}")
    rate, dtype = f"lr={config.lr}" if share >= 0.99 else f"{largest:.2g}", config.model.policy_dtype
    if config.lora is not None or config.model.adapter is not None:
        if largest < _SMALL_FOR_ADAPTERS:
            parts.append(f"{rate} hardly moves an adapter: 1e-5 to 1e-4 is usual")
    elif dtype in ("bfloat16", "float16") and largest < _SMALL_IN_16_BITS:
        parts.append(
            f"model.policy_dtype={dtype} rounds most updates away at {rate} (at 5e-7, only 0.1 % of weights change): "
            "keep float32 weights and compute in 16 bits, model.policy_dtype=float32 model.policy_mp=bfloat16"
        )
    return f"WARNING: {'; '.join(parts)}" if parts else None


def lr_multiplier(config: DictConfig, n_steps: int) -> Callable[[int], float]:
    """Return a function that gives the factor of `lr` after a number of steps: warmup, then the schedule.

    Raises: UserError if the factor is negative or not finite at the first, middle or last step or at the end of warmup.
    """
    warmup_steps = count_warmup_steps(config, n_steps)
    if config.lr_scheduler == DEFAULT_SCHEDULE:
        return lambda step: min(1.0, (step + 1) / (warmup_steps + 1))  # as in the original
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
    # shifted by one step, as in the original: a schedule's first and last rates may be 0
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
