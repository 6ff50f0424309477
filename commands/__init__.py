"""Running a command: its errors, its workers, its run directory, and sweeps."""
