"""Rules for single values, which several checks share."""

from collections.abc import Iterable

from utils import UserError, closest_match


def check_number(key: str, value: object, kind: type, lowest: float, highest: float):
    """Raise UserError unless a value is a number of this type in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{key}={value}: expected {'an integer' if kind is int else 'a number'}")
    if not lowest <= value <= highest:
        raise UserError(f"{key}={value}: must be {lowest:g} to {highest:g}")


def check_one_of(key: str, value: object, options: Iterable[str | None], note: str = ""):
    """Raise UserError, with the closest match, unless a value is one of the options."""
    if value not in (options := list(options)):
        names = ["null" if option is None else option for option in options]
        raise UserError(f"{key}={value}: must be one of {', '.join(names)}{note}.{closest_match(str(value), names)}")
