"""What the commands that read a run folder have in common."""

import click

TRUST = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Allow the code that comes with the model, where the run did.",
)
