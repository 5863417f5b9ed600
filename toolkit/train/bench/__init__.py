"""``toolkit bench``: run the toolkit, TRL's colocate mode and Unsloth one after another on the same
workload.
"""
