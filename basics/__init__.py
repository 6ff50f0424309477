"""Helpers that every module may import, without torch: atomic file writes, locks, checks of output paths, printing."""
