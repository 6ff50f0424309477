"""Drawing responses by other programs than transformers."""
