"""Checks of numbers."""

from utils import UserError


def is_number(value: object, kind: type = float) -> bool:
    """True for an integer and, unless `kind` is int, for a float; false for true and false, which Python counts too."""
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def check_number(key: str, value: object, kind: type, lowest: float, highest: float):
    """Raise UserError unless a value is a number of this kind, int or float, in the range."""
    if not is_number(value, kind):
        raise UserError(f"{key}={value}: expected {'an integer' if kind is int else 'a number'}")
    if not lowest <= value <= highest:
        raise UserError(f"{key}={value}: must be {lowest:g} to {highest:g}")
