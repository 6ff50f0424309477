"""Ways to compute the same numbers faster or in less memory: prefix sharing, packed rows, whole batches in parts."""
