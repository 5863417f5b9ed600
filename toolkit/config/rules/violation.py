"""Register rules, and turn their violations into findings.

A rule is a function with an id. It yields a violation for each fault that it finds in a run file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.finding import Finding, Fix, Severity
from toolkit.config.rules.run import SkipRule, key_path
from toolkit.config.source import dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run
    from toolkit.config.source import KeyPath


@dataclass(frozen=True, slots=True)
class RuleViolation:
    """One fault that a rule found. ``Rule.findings`` adds the rule's id, its severity and the
    position in the run file.
    """

    path: str | KeyPath
    message: str
    notes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    related: tuple[str, ...] = ()
    on_key: bool = False  # True: the key itself is wrong. False: its value is wrong.
    severity: Severity | None = None  # the severity, if it differs from the rule's own
    unknown: bool = False  # True: this machine lacks the files for the check


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``summary`` is the first paragraph of the docstring of the rule's function, and
    ``why`` is the rest of this docstring.
    """

    id: str
    severity: Severity
    keys: tuple[str, ...]
    summary: str
    why: str
    example: str
    fix: str
    check: Callable[[Run], Iterator[RuleViolation]]

    def findings(self, run: Run) -> Iterator[Finding]:
        """Yield the findings of this rule on ``run``. If the rule needs a value that is invalid, it
        yields nothing, because another rule reports the invalid value.
        """
        try:
            for violation in self.check(run):
                yield _build_finding(run, self, violation)
        except SkipRule:
            return


def _build_finding(run: Run, made_by: Rule, violation: RuleViolation) -> Finding:
    """The finding for a violation, with its position in the run file."""
    path = key_path(violation.path) if isinstance(violation.path, str) else violation.path
    node = _reported_node(run, path, violation.related)
    position = (
        node.key_position if violation.on_key and node.key_position is not None else node.position
    )
    return Finding(
        rule=made_by.id,
        severity=violation.severity or made_by.severity,
        message=f"{dotted(path)}: {violation.message}",
        path=path,
        source=node.source,
        position=position,
        notes=violation.notes,
        fixes=violation.fixes,
        related=tuple(
            related_node
            for related_path in violation.related
            if (related_node := run.node(related_path)) and related_node is not node
        ),
        unknown=violation.unknown,
    )


def _reported_node(run: Run, path: KeyPath, related: tuple[str, ...]) -> Node:
    """The node at which a violation is reported: the key at ``path`` if the run file sets it. Else
    a related key that the run file sets, the section of the key, or the whole file.
    """
    for candidate in (path, *(key_path(related_path) for related_path in related), path[:1]):
        node = run.document.find_node(candidate)
        if node is not None:
            return node
    return run.document.root


RULES: dict[str, Rule] = {}


def rule(
    name: str, keys: str, *, example: str, fix: str, severity: Severity = Severity.ERROR
) -> Callable[[Callable[[Run], Iterator[RuleViolation]]], Callable[[Run], Iterator[RuleViolation]]]:
    """Register a function as the check of rule ``name``. ``keys`` are the dotted keys that the rule
    checks, separated by spaces.
    """

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
