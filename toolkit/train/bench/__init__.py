"""``toolkit bench``: run the toolkit, TRL (with vLLM in the process of the trainer) and Unsloth one
after another on the same workload.
"""
