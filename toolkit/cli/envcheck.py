"""``envcheck``: show the GPUs, check the node, size a run, validate a run file.

No command of ``envcheck`` imports torch.
"""

from __future__ import annotations

import click

from toolkit.base.version import __version__
from toolkit.cli.exit_codes import command_main
from toolkit.cli.lazy_group import HELP_SETTINGS, LazyGroup

COMMANDS = {
    "probe": ("toolkit.cli.probe:probe", "Show this node's GPUs as NVML sees them."),
    "check": ("toolkit.cli.check:check", "Check that this node can run the job."),
    "size": ("toolkit.cli.size:size", "Choose gpu_memory_utilization, LoRA rank and batch sizes."),
    "validate": ("toolkit.cli.validate:validate", "Find every error in a run file."),
    "schema": ("toolkit.cli.schema:schema", "Print a JSON Schema that editors understand."),
    "explain": (
        "toolkit.cli.explain:explain",
        "Explain a rule, a check, a config key, or a pasted traceback.",
    ),
    "record": (
        "toolkit.cli.record:record",
        "Write a snapshot of this node without names and secrets.",
    ),
    "replay": ("toolkit.cli.record:replay", "Run the checks on a snapshot of another node."),
    "calibrate": (
        "toolkit.cli.calibrate:calibrate",
        "Compare a run's measured memory peaks with the prediction.",
    ),
}


@click.group(
    "envcheck",
    cls=LazyGroup,
    commands_at=COMMANDS,
    other_program=("toolkit", "toolkit.cli.train:COMMANDS"),
    context_settings=HELP_SETTINGS,
)
@click.version_option(__version__, prog_name="envcheck")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Find errors of a run file, a node or the installation before a run uses GPU time."""
    del debug  # command_main reads --debug from sys.argv, so that it also applies during imports


main = command_main(cli)
