"""Evaluate models: metrics of checkpoints, samples, and judges of responses."""
