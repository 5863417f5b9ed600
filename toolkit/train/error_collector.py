"""Raise the errors of independent checks together, so that one attempt shows all mistakes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


class ErrorCollector:
    """Collects the errors of several checks. Each check runs in its own block
    ``with collector.collect_error():``.
    """

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    @contextmanager
    def collect_error(self) -> Iterator[None]:
        """Catch a ConfigError that the ``with`` block raises, and add it to ``errors``."""
        try:
            yield
        except ConfigError as error:
            self.errors.append(error)

    def raise_errors(self) -> None:
        """Raise the collected error, if there is one. Several errors are raised as one error. Its
        message lists the message and the fix of each error. Its class is the class of the first
        error.
        """
        if not self.errors:
            return
        first = self.errors[0]
        if len(self.errors) == 1:
            raise first
        locations = {error.where for error in self.errors}
        shared_location = first.where if len(locations) == 1 else None
        items = "\n".join(
            _list_item(error, with_location=shared_location is None) for error in self.errors
        )
        raise type(first)(f"{len(self.errors)} mistakes\n{items}", where=shared_location)


def _list_item(error: ConfigError, *, with_location: bool) -> str:
    """Return the message and the fix of ``error`` as lines of a list. With ``with_location``, the
    first line begins with the place of the mistake (``error.where``).
    """
    with_location = (
        with_location and error.where is not None and not error.message.startswith(error.where)
    )
    first_line = f"{error.where}: {error.message}" if with_location else error.message
    lines = [*first_line.split("\n"), *([f"  fix: {error.fix}"] if error.fix else [])]
    return "- " + "\n  ".join(lines)
