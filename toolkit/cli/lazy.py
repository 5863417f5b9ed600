"""A click group that imports the module of a command only when the command runs. This keeps
``--help`` fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from toolkit.cli.exits import left_alone

HELP = {"help_option_names": ["-h", "--help"]}


class LazyGroup(click.Group):
    """A click group that imports a command only when it is used.

    ``commands_at`` maps a command's name to ``(module:attribute, one line of help)``.
    """

    def __init__(self, *args: Any, commands_at: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in self.commands_at:
            return None
        module, _, attribute = self.commands_at[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. After Ctrl-C, "interrupted" is printed instead of click's text."""
        with left_alone():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands for ``--help``. No command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.commands_at.items()])
