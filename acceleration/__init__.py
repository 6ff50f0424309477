"""Compute the same numbers faster or in less memory: prefix sharing, packed rows, a check of both, ..."""
