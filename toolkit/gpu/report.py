"""Build the JSON of ``envcheck probe --json``, ``envcheck check --json`` and preflight.json. The
schema is report.schema.json.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import NodeError
from toolkit.base.version import __version__
from toolkit.gpu.checks import checks_by_id, exit_code
from toolkit.gpu.checks.driver import newest_cuda
from toolkit.gpu.devices import visible_devices
from toolkit.gpu.presence import find_presence
from toolkit.gpu.snapshot_json import gpu_to_json, readings_to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.gpu.checks import CheckResult
    from toolkit.gpu.snapshot import NodeSnapshot

SCHEMA_ID = "urn:grpo-toolkit:schema:report:1"
NO_GPU_EXIT = NodeError.exit_code


def probe_report(snapshot: NodeSnapshot) -> dict[str, Any]:
    """Return the report of a node, without results of checks. The exit code in the report is 0 if
    the node has a GPU, else 3.
    """
    code = 0 if snapshot.gpus else NO_GPU_EXIT
    return {**_report_head("probe", code), **_node_sections(snapshot)}


def check_report(
    snapshot: NodeSnapshot,
    results: Sequence[CheckResult],
    *,
    strict: bool = False,
    node: bool = False,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report of a node with the results of its checks. The keys of ``extra`` are added
    to the report. In the preflight.json of a run, these keys are ``device`` (the card that the run
    is sized for; None is the CPU) and ``sizing``.
    """
    result_ids = {result.id for result in results}
    code = exit_code(results, strict=strict, node=node)
    report = {
        **_report_head("check", code),
        "verdict": worst_verdict(results),
        "checks": [result.to_json() for result in results],
        "not_applicable": [name for name in checks_by_id() if name not in result_ids],
        **_node_sections(snapshot),
    }
    return {**report, **(extra or {})}


def worst_verdict(results: Sequence[CheckResult]) -> str:
    """Return the worst verdict of the results. The order from bad to good is fail, unknown, warn,
    ok.
    """
    verdicts = {result.verdict for result in results}
    return next((verdict for verdict in ("fail", "unknown", "warn") if verdict in verdicts), "ok")


def utc_now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _report_head(kind: str, code: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA_ID,
        "kind": kind,
        "toolkit_version": __version__,
        "time": utc_now(),
        "exit_code": code,
    }


def _node_sections(snapshot: NodeSnapshot) -> dict[str, Any]:
    visible = visible_devices(snapshot)
    order = {(gpu.parent, gpu.index): number for number, gpu in enumerate(visible.devices)}
    gpus = []
    for gpu in snapshot.gpus:
        row = {"cuda_index": order.get((None, gpu.index)), **gpu_to_json(gpu)}
        for mig_slice, values in zip(gpu.slices, row["slices"], strict=True):
            values["cuda_index"] = order.get((mig_slice.parent, mig_slice.index))
        gpus.append(row)
    presence = find_presence(snapshot)
    version = snapshot.driver.version.value
    return {
        "presence": {"kind": presence.kind, "text": presence.text, "remedy": presence.remedy},
        "driver": {
            **readings_to_json(snapshot.driver),
            "cuda": newest_cuda(version) if version else None,
        },
        "gpus": gpus,
        "host": readings_to_json(snapshot.host),
        "software": readings_to_json(snapshot.software),
        "model": readings_to_json(snapshot.model),
    }
