"""Faster ways to compute the same numbers: attention over packed rows, weights cast once per step."""
