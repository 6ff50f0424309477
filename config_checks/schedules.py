"""Check the keys `lr_scheduler` and `lr_scheduler_args`."""

import inspect
import math

from config_checks.values import check_one_of
from utils import UserError, closest_match

_SET_BY_US = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def schedules() -> dict[str, list[str]]:
    """Return the values of `lr_scheduler`, and the `lr_scheduler_args` of each."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    arguments = {}
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        parameters = inspect.signature(function).parameters
        if "kwargs" not in parameters:  # schedules with it depend on a metric, not on the step
            arguments[kind.value] = [name for name in parameters if name not in _SET_BY_US]
    return arguments


def check_schedule(name: str, args: dict):
    """Raise UserError for an unknown schedule or an argument that it doesn't take; imports Transformers (seconds)."""
    known = schedules()
    check_one_of("lr_scheduler", name, known)
    for key in args:
        if key not in known[name]:
            hint = " Its warmup is the key warmup_steps." if "warmup_steps" in key else closest_match(key, known[name])
            takes = ", ".join(known[name]) or "none"
            raise UserError(f"lr_scheduler_args.{key}: {name} takes no such argument.{hint} It takes: {takes}")
        if isinstance(args[key], float) and not math.isfinite(args[key]):
            raise UserError(f"lr_scheduler_args.{key}={args[key]}: must be a finite number")
