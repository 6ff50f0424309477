"""Helpers for every module: whole files, locks, outputs, printing, the error for a user's mistake. No torch."""
