"""Where completions come from, and the seed of each."""
