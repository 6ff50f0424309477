"""Logs, tables and pictures of a run's numbers and samples."""
