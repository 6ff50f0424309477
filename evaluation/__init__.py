"""Which of two responses is better: pairs of them, judges, and what their verdicts amount to."""
