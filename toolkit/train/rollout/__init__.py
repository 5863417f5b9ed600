"""Sampling of completions, each with its own seed."""
