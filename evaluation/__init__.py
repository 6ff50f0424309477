"""Evaluation of responses: pairs of them, judges, verdicts, and summaries."""
