"""Checks of the optimizer, the schedule of the learning rate, and their arguments."""

import inspect
import math

import torch
from omegaconf import DictConfig, OmegaConf

from config_checks.rules import check_one_of
from utils import UserError, closest_match

_SET_BY_US = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
# LBFGS needs several losses per step, SparseAdam sparse gradients
_OTHERS = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)


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
    """Refuse an unknown schedule or unknown arguments of it, with a UserError; importing Transformers takes seconds."""
    known = schedules()
    check_one_of("lr_scheduler", name, known)
    for key in args:
        if key not in known[name]:
            hint = " Its warmup is the key warmup_steps." if "warmup_steps" in key else closest_match(key, known[name])
            takes = ", ".join(known[name]) or "none"
            raise UserError(f"lr_scheduler_args.{key}: {name} takes no such argument.{hint} It takes: {takes}")
        if isinstance(args[key], float) and not math.isfinite(args[key]):
            raise UserError(f"lr_scheduler_args.{key}={args[key]}: must be a finite number")


def check_optimizer(config: DictConfig):
    """Refuse an unknown optimizer or unknown arguments of it, with a UserError."""
    classes = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    optimizers = {
        name: value for name, value in classes.items()
        if issubclass(value, torch.optim.Optimizer) and value not in _OTHERS
    }  # fmt: skip
    check_one_of("optimizer", config.optimizer, optimizers)
    accepted = dict(inspect.signature(optimizers[config.optimizer]).parameters)
    del accepted["params"], accepted["lr"]
    for name, value in OmegaConf.to_container(config.optimizer_args).items():
        if name not in accepted:
            hint = " Its learning rate is the key lr." if name == "lr" else closest_match(name, accepted)
            raise UserError(f"optimizer_args.{name}: {config.optimizer} takes no such argument.{hint}")
        _check_optimizer_argument(f"optimizer_args.{name}", value, accepted[name])


def _check_optimizer_argument(key: str, value: object, parameter: inspect.Parameter):
    """Refuse a string for a number, a number for true or false, and the like, by the optimizer's signature."""
    default, annotation = parameter.default, str(parameter.annotation)
    if value is None and default is None:
        return
    if isinstance(default, tuple):
        numbers = value if isinstance(value, list) and len(value) == len(default) else [""]
        if any(number is not None and _is_no_number(number) for number in numbers):
            raise UserError(f"{key}={value}: expected {len(default)} numbers, e.g. {list(default)}")
    elif isinstance(default, bool) or (default is None and "bool" in annotation):
        if not isinstance(value, bool):
            raise UserError(f"{key}={value}: expected true or false")
    elif (isinstance(default, int | float) or "float" in annotation) and _is_no_number(value):
        raise UserError(f"{key}={value}: expected a number")


def _is_no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)
