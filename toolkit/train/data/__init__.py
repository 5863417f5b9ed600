"""From the dataset section of a run file to prompts that the trainer takes."""
