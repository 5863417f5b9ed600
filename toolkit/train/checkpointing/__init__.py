"""The run folder: checkpoints, branches, resume, and stopping on purpose."""
