"""Read the dataset section of a run file and prepare prompts for the trainer."""
