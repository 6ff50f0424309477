"""Losses besides the paper's own, and what the signature of a loss may declare."""
