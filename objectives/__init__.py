"""The objectives beside the paper's own, and what the signature of a loss may ask for."""
