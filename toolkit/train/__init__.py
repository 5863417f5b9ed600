"""Train a whole run: data, rewards, trainer, checkpoints, manifest, report."""
