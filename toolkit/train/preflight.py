"""Before anything heavy: look at the node, judge it for this run, and fill every "auto"."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, NodeError, RetryError
from toolkit.base.paths import write_file
from toolkit.base.secrets import redact_tree
from toolkit.gpu import devices
from toolkit.gpu.checks import CheckContext, run_checks
from toolkit.gpu.report import check_report
from toolkit.gpu.snapshot import take
from toolkit.sizing.device import Device
from toolkit.sizing.solve import resolve

if TYPE_CHECKING:
    from toolkit.config.model import RunConfig
    from toolkit.gpu.checks import CheckResult
    from toolkit.gpu.snapshot import NodeSnapshot
    from toolkit.sizing.result import SizingResult

FAILURES = {"node": NodeError, "retry": RetryError, "user": ConfigError}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """``config`` has every "auto" filled; ``device`` None is the CPU."""

    config: RunConfig
    snapshot: NodeSnapshot
    device: Device | None
    sizing: SizingResult
    checks: tuple[CheckResult, ...]

    def to_json(self) -> dict[str, Any]:
        """As in preflight.json (report.schema.json)."""
        device = None if self.device is None else self.device.name
        run = {"device": device, "sizing": self.sizing.to_json()}
        return check_report(self.snapshot, self.checks, run=run)

    def write(self, run_dir: Path) -> Path:
        """Write preflight.json. Raises OSError."""
        text = json.dumps(redact_tree(self.to_json()), indent=2, default=str) + "\n"
        return write_file(run_dir / "preflight.json", text)


def preflight(config: RunConfig, *, world_size: int = 1, judge: bool = True) -> Preflight:
    """Look, judge, size. With ``judge`` False a failed check stops nothing (``--dry-run``).

    Raises:
        NodeError, RetryError, ConfigError: a check failed; the message is the first one's.
        ConfigError: the run does not fit, with the priced list of what would make it fit.
    """
    snapshot = take(
        paths={"output": Path(config.runtime.output_dir)},
        model=config.model.model_name,
        revision=config.model.revision,
    )
    checks = tuple(run_checks(snapshot, context_of(config, world_size)))
    if judge:
        refuse(checks)
    gpu = devices.select(
        snapshot, int(os.environ.get("LOCAL_RANK", "0")) if snapshot.gpus else None
    )
    device = None if gpu is None else Device.from_node(snapshot, gpu)
    resolved, sizing = resolve(config, device, world_size=world_size)
    return Preflight(
        config=resolved, snapshot=snapshot, device=device, sizing=sizing, checks=checks
    )


def context_of(config: RunConfig, world_size: int) -> CheckContext:
    """What the run asks of the node."""
    share = config.model.gpu_memory_utilization
    return CheckContext(
        configured=True,
        engine=config.runtime.engine,
        load_in_4bit=config.model.load_in_4bit,
        float8_kv_cache=config.model.float8_kv_cache,
        dtype=config.model.dtype,
        gpu_memory_utilization=None if share == "auto" else share,
        sleeps=config.model.enable_sleep_mode is True,
        tensor_parallel_size=config.model.tensor_parallel_size,
        world_size=world_size,
        model=config.model.model_name,
        revision=config.model.revision,
    )


def refuse(checks: tuple[CheckResult, ...]) -> None:
    """Raise the error of the failed check that decides: a bad node before the user's fault."""
    failed = [check for check in checks if check.verdict == "fail"]
    order = ["node", "user", "retry"]
    for check in sorted(failed, key=lambda check: order.index(check.blame or "node")):
        raise FAILURES[check.blame or "node"](
            check.evidence,
            where=f"check {check.id}",
            fix=f"{check.remedy or 'see the check'} (all checks: envcheck check)",
        )
