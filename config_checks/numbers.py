"""Checks of single values."""

from utils import UserError


def check_number(key: str, value: object, kind: type, lowest: float, highest: float):
    """Raise UserError unless a value is a number of this type in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{key}={value}: expected {'an integer' if kind is int else 'a number'}")
    if not lowest <= value <= highest:
        raise UserError(f"{key}={value}: must be {lowest:g} to {highest:g}")
