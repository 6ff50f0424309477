"""What every module may use: whole files, locks, outputs, printing, the error for a user's mistake. No torch."""
