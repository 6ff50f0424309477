"""Ways to compute the same in less time: attention over packed rows, weights cast once a step."""
