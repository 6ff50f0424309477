"""The error for a user's mistake, in a module that doesn't import torch."""


class UserError(ValueError):
    """A user's mistake; commands print its message alone, without a traceback."""
