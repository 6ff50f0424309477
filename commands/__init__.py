"""Run a command: its config, output, workers and run directory, and sweeps."""
