"""``toolkit``: the group of the commands train, demo, generate, export, tune, import and bench."""

from __future__ import annotations

import click

from toolkit.base.version import __version__
from toolkit.cli.early_signals import StoppableGroup
from toolkit.cli.exit_codes import command_main
from toolkit.cli.lazy_group import HELP_SETTINGS

COMMANDS = {
    "train": ("toolkit.cli.train_run:train", "Check the node, train a run file, write a report."),
    "demo": (
        "toolkit.cli.demo:demo",
        "Create a small model and data, and run all commands on them.",
    ),
    "generate": ("toolkit.cli.generate:generate", "Generate completions with a trained run."),
    "export": ("toolkit.cli.export:export", "Write a run's adapter, or merged weights."),
    "tune": ("toolkit.cli.tune:tune", "Tune the LoRA kernels of vLLM on this card."),
    "import": (
        "toolkit.cli.import_config:import_config",
        "Make a run file from another tool's config, script or notebook.",
    ),
    "bench": (
        "toolkit.cli.bench:bench",
        "Compare the toolkit's step time and memory with TRL and Unsloth.",
    ),
}


@click.group(
    "toolkit",
    cls=StoppableGroup,
    commands_at=COMMANDS,
    other_program=("envcheck", "toolkit.cli.envcheck:COMMANDS"),
    context_settings=HELP_SETTINGS,
)
@click.version_option(__version__, prog_name="toolkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Fine-tune a language model with GRPO and LoRA. vLLM generates the completions on the same
    GPU.
    """
    del debug  # command_main reads --debug from sys.argv, so that it also applies during imports


main = command_main(cli)
