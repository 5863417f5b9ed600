"""Functions that load the snapshot of a recorded node and run one check on a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cases

from toolkit.gpu.checks import CheckContext, CheckResult, run_checks
from toolkit.gpu.snapshot_json import node_from_json

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot


def recorded_snapshot(name: str) -> NodeSnapshot:
    return node_from_json(cases.load(name).node)


def run_check(
    snapshot: NodeSnapshot, check: str, context: CheckContext | None = None
) -> CheckResult:
    (result,) = run_checks(snapshot, context, only=[check])
    return result
