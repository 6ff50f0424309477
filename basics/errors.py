"""`UserError`, in a module of its own that doesn't import torch."""


class UserError(ValueError):
    """A user's mistake; commands print its message alone, without a traceback."""
