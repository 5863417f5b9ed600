"""Read the data that the section ``dataset`` of a run file names, and prepare prompts for the
trainer.
"""
