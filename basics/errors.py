"""The error for a user's mistake, where every module can import it without importing torch."""


class UserError(ValueError):
    """A user's mistake; commands print its message alone, without a traceback."""
