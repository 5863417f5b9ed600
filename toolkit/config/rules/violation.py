"""Register rules, and turn their violations into findings.

A rule is a function with an id. It yields a violation for each fault that it finds in a run file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.finding import Finding, Fix, Severity
from toolkit.config.rules.run import Unjudged, parts_of
from toolkit.config.source import dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run
    from toolkit.config.source import KeyPath


@dataclass(frozen=True, slots=True)
class RuleViolation:
    """One fault that a rule found. ``Rule.judge`` adds the rule's id, its severity and the position
    in the run file.
    """

    at: str | KeyPath
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

    def judge(self, run: Run) -> Iterator[Finding]:
        """Yield the findings of this rule on ``run``. If the rule needs a value that is invalid, it
        yields nothing, because another rule reports the invalid value.
        """
        try:
            for fault in self.check(run):
                yield _finding(run, self, fault)
        except Unjudged:
            return


def _finding(run: Run, made_by: Rule, fault: RuleViolation) -> Finding:
    """The finding for a violation, with its position in the run file."""
    path = parts_of(fault.at) if isinstance(fault.at, str) else fault.at
    node = _shown(run, path, fault.related)
    mark = node.key if fault.on_key and node.key is not None else node.mark
    return Finding(
        rule=made_by.id,
        severity=fault.severity or made_by.severity,
        message=f"{dotted(path)}: {fault.message}",
        path=path,
        source=node.source,
        mark=mark,
        notes=fault.notes,
        fixes=fault.fixes,
        related=tuple(
            other for one in fault.related if (other := run.node(one)) and other is not node
        ),
        unknown=fault.unknown,
    )


def _shown(run: Run, path: KeyPath, related: tuple[str, ...]) -> Node:
    """The node at which a violation is reported: the key at ``path`` if the run file sets it. Else
    a related key that the run file sets, the section of the key, or the whole file.
    """
    for candidate in (path, *(parts_of(one) for one in related), path[:1]):
        node = run.document.node(candidate)
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
