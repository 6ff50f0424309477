"""What a config may say, what it means, and every error message about it."""
