"""A rule is a function with an id, texts for people, and the faults that it yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.finding import Finding, Fix, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.config.document import KeyPath
    from toolkit.config.rules.run import Run


@dataclass(frozen=True, slots=True)
class RuleViolation:
    """What a rule yields; the registry adds the rule's id and severity."""

    at: str | KeyPath
    message: str
    notes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    related: tuple[str, ...] = ()
    on_key: bool = False  # the key is wrong, not its value
    severity: Severity | None = None  # if it differs from the rule's own
    unknown: bool = False


class Unjudged(Exception):
    """Raised when an operand is invalid and already reported. The rule then reports nothing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``summary`` and ``why`` are its function's docstring."""

    id: str
    severity: Severity
    keys: tuple[str, ...]
    summary: str
    why: str
    example: str
    fix: str
    check: Callable[[Run], Iterator[RuleViolation]]

    def judge(self, run: Run) -> Iterator[Finding]:
        """The findings of this rule on ``run``."""
        try:
            for fault in self.check(run):
                yield run.finding(self, fault)
        except Unjudged:
            return


RULES: dict[str, Rule] = {}


def rule(
    name: str, keys: str, *, example: str, fix: str, severity: Severity = Severity.ERROR
) -> Callable[[Callable[[Run], Iterator[RuleViolation]]], Callable[[Run], Iterator[RuleViolation]]]:
    """Register a function as rule ``name`` on ``keys`` (blank-separated, dotted)."""

    def register(
        check: Callable[[Run], Iterator[RuleViolation]],
    ) -> Callable[[Run], Iterator[RuleViolation]]:
        summary, _, why = (check.__doc__ or "").strip().partition("\n\n")
        assert name not in RULES
        assert summary
        RULES[name] = Rule(
            id=name,
            severity=severity,
            keys=tuple(keys.split()),
            summary=" ".join(summary.split()),
            why=" ".join(why.split()),
            example=example.strip("\n"),
            fix=fix,
            check=check,
        )
        return check

    return register
