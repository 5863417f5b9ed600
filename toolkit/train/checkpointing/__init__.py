"""The run folder: checkpoints, branches, resume, and stopping on a signal."""
