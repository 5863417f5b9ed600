"""Raise the errors of independent checks together, so that one attempt shows all mistakes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Collected:
    """The errors that checks raised inside ``check``."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    @contextmanager
    def check(self) -> Iterator[None]:
        """Keep a ConfigError that the block raises, and continue after the block."""
        try:
            yield
        except ConfigError as error:
            self.errors.append(error)

    def refuse(self) -> None:
        """Raise the error that was kept. Several become one error of the first one's class, whose
        message lists all of them, each with its fix.
        """
        if not self.errors:
            return
        first = self.errors[0]
        if len(self.errors) == 1:
            raise first
        places = {error.where for error in self.errors}
        shared = first.where if len(places) == 1 else None
        listed = "\n".join(_item(error, named=shared is None) for error in self.errors)
        raise type(first)(f"{len(self.errors)} mistakes\n{listed}", where=shared)


def _item(error: ConfigError, *, named: bool) -> str:
    """One error as lines; ``named`` adds its place."""
    named = named and error.where is not None and not error.message.startswith(error.where)
    head = f"{error.where}: {error.message}" if named else error.message
    lines = [*head.split("\n"), *([f"  fix: {error.fix}"] if error.fix else [])]
    return "- " + "\n  ".join(lines)
