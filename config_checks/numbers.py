"""Checks of single values: numbers in a range, files that can be written."""

import os

from utils import UserError


def check_number(key: str, value: object, kind: type, lowest: float, highest: float):
    """Raises: UserError unless it is a number of this type in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{key}={value}: expected a {'whole ' if kind is int else ''}number")
    if not lowest <= value <= highest:
        raise UserError(f"{key}={value}: must be {lowest:g} to {highest:g}")


def check_can_be_written(key: str, path: str | None):
    """Raises: UserError if a file can't be written, in what the key gives."""
    if path is not None and not os.access(os.path.dirname(os.path.abspath(str(path))), os.W_OK):
        raise UserError(f"{key}={path}: can't write there; give a file in a directory that can be written")
    if path is not None and os.path.isdir(str(path)):
        raise UserError(f"{key}={path} is a directory; give a file")
