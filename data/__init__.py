"""Turn rows of text into batches of token ids."""
