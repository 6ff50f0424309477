"""Every check of a config, and the messages about it."""
