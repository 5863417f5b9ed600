"""Define a term: one line of the memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["always", "rollout", "training"]


@dataclass(frozen=True, slots=True)
class Term:
    """A part of the run's memory. ``name`` is its name, ``nbytes`` its size, and ``phase`` the
    phase of the run in which it is in use. ``source`` says how ``nbytes`` was computed.
    """

    name: str
    nbytes: int
    source: str
    phase: Phase = "always"

    def to_json(self) -> dict[str, str | int]:
        return {
            "term": self.name,
            "bytes": self.nbytes,
            "source": self.source,
            "phase": self.phase,
        }


def total_bytes(terms: tuple[Term, ...] | list[Term], *phases: Phase) -> int:
    """The sum of the bytes of the terms in ``phases``; of all terms if no phase is given."""
    return sum(term.nbytes for term in terms if not phases or term.phase in phases)
