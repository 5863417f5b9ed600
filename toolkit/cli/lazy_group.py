"""A click group that imports the module of a command only when the command runs. This keeps
``--help`` fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from toolkit.base.did_you_mean import similar_words
from toolkit.cli.exit_codes import exit_quietly

HELP_SETTINGS = {"help_option_names": ["-h", "--help"]}


class LazyGroup(click.Group):
    """A click group that imports a command only when it is used.

    ``commands_at`` maps a command's name to ``(module:attribute, one line of help)``.
    ``other_program`` is the name of the toolkit's other program and the ``module:attribute`` of its
    commands. If the user calls a command that only the other program has, the error names that
    program.
    """

    def __init__(
        self,
        *args: Any,
        commands_at: dict[str, tuple[str, str]],
        other_program: tuple[str, str],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.commands_at = commands_at
        self.other_program = other_program

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in self.commands_at:
            return None
        command = _import_object(self.commands_at[cmd_name][0])
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` names.

        Raises:
            UsageError: there is no such command. The message suggests a command with a similar
                name, or the other program.
        """
        name = args[0]
        if name in self.commands_at or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        program, commands = self.other_program
        similar = similar_words(name, self.commands_at)
        similar += [f"{program} {other}" for other in similar_words(name, _import_object(commands))]
        hint = f" Did you mean {' or '.join(f'`{one}`' for one in similar)}?" if similar else ""
        raise click.UsageError(f"No such command {name!r}.{hint}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. After Ctrl-C, "interrupted" is printed instead of click's text."""
        with exit_quietly():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands for ``--help``. No command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.commands_at.items()])


def _import_object(location: str) -> Any:
    """Import the object at ``location``, which is ``module:attribute``."""
    module, _, attribute = location.partition(":")
    return getattr(import_module(module), attribute)
