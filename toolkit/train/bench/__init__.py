"""``toolkit bench``: ours, TRL's colocate mode and Unsloth, in turn, on the same work."""
