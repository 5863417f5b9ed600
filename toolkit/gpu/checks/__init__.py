"""The list of all checks, and functions that select and run checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base import did_you_mean
from toolkit.base.errors import InputError
from toolkit.gpu.checks.check import Check, CheckContext, CheckResult, context_from_json
from toolkit.gpu.checks.devices import CHECKS as DEVICES
from toolkit.gpu.checks.driver import CHECKS as DRIVER
from toolkit.gpu.checks.health import CHECKS as HEALTH
from toolkit.gpu.checks.host import CHECKS as HOST
from toolkit.gpu.checks.memory import CHECKS as MEMORY
from toolkit.gpu.checks.model import CHECKS as MODEL
from toolkit.gpu.checks.runtime_environment import CHECKS as PLACE
from toolkit.gpu.checks.software import CHECKS as SOFTWARE
from toolkit.gpu.checks.speed import CHECKS as SPEED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from toolkit.gpu.snapshot import NodeSnapshot

__all__ = [
    "CHECKS",
    "Check",
    "CheckContext",
    "CheckResult",
    "checks_by_id",
    "context_from_json",
    "exit_code",
    "run_checks",
    "select_checks",
]

_FAMILIES = (DRIVER, DEVICES, MEMORY, HEALTH, SPEED, HOST, SOFTWARE, MODEL, PLACE)
CHECKS = tuple(check for family in _FAMILIES for check in family)


def checks_by_id() -> dict[str, Check]:
    """Return {id: check} for all checks, in the order in which they run."""
    return {check.id: check for check in CHECKS}


def select_checks(only: Iterable[str] = (), skip: Iterable[str] = ()) -> list[Check]:
    """Return the checks that ``only`` and ``skip`` select. Each entry of ``only`` and ``skip`` is
    the id of a check (``health.ecc``) or a family of checks (``health``). The family is the part of
    the id before the dot.

    Raises InputError for any other entry.
    """
    checks = checks_by_id()
    families = {check.family for check in checks.values()}
    selected, skipped = set(only), set(skip)
    for entry in sorted(selected | skipped):
        if entry not in checks and entry not in families:
            similar = did_you_mean.similar_words(
                entry, [*families, *checks], cutoff=0.5, max_difference=1
            )
            fix = f"did you mean {', '.join(similar)}? " if similar else ""
            names = ", ".join(sorted(families))
            raise InputError(
                f"no check named {entry!r}",
                fix=f"{fix}use the id of a check, or one of these families: {names}",
            )
    return [
        check
        for check in checks.values()
        if (not selected or {check.id, check.family} & selected)
        and not {check.id, check.family} & skipped
    ]


def run_checks(
    snapshot: NodeSnapshot,
    context: CheckContext | None = None,
    *,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> list[CheckResult]:
    """Run the checks that ``only`` and ``skip`` select, and return their results. The result does
    not contain checks that do not apply to the snapshot.
    """
    requirements = context or CheckContext()
    checks = [
        check for check in select_checks(only, skip) if check.about_node or not requirements.node
    ]
    results = [check.result(snapshot, requirements) for check in checks]
    return [result for result in results if result is not None]


def exit_code(results: Sequence[CheckResult], *, strict: bool = False, node: bool = False) -> int:
    """Return the exit code for the results of the checks (see ``base.errors.EXIT_CODES``). The exit
    code shows who must act.

    A bad node (3) takes precedence over a user error (1), because a bad node can cause the user
    error. For example, a job requests eight cards, but only seven respond.

    With ``node``, only a bad node is a failure. Therefore a scheduler's prolog does not drain a
    node because of a mistake in the job, or because of a process that is just ending. With
    ``strict``, the exit code is 5 if no check failed but a check has the verdict "unknown".
    """
    blames = {result.blame for result in results if result.verdict == "fail"}
    for blame, code in (("node", 3), ("user", 1), ("retry", 4)):
        if blame in blames and (blame == "node" or not node):
            return code
    if strict and any(result.verdict == "unknown" for result in results):
        return 5
    return 0
