"""Choose prompts and sample completions. Each completion has its own seed."""
