"""The pre-flight: check the node before any heavy work, and replace every "auto" in the run file by
a value.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, NodeError, RetryError
from toolkit.base.paths import write_file
from toolkit.base.process_environment import local_rank, local_world_size
from toolkit.base.secrets import redact_tree
from toolkit.config import chat_format, parallel
from toolkit.config.resolved import resolve_run
from toolkit.engine.group_checks import check_groups
from toolkit.gpu import devices
from toolkit.gpu.checks import CheckContext, run_checks
from toolkit.gpu.report import check_report
from toolkit.gpu.snapshot import take_snapshot
from toolkit.sizing.device import Device, local_situation
from toolkit.sizing.families import FAMILIES
from toolkit.sizing.solve import resolve_for_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from toolkit.config.resolved import ResolvedRun, Situation
    from toolkit.config.run_config import RunConfig
    from toolkit.gpu.checks import CheckResult
    from toolkit.gpu.snapshot import NodeSnapshot
    from toolkit.sizing.result import SizingResult
    from toolkit.train.process_control import Peers

    Checker: TypeAlias = Callable[[Situation], object]

# The error for each kind of failed check. If several checks fail, the first kind in this order is
# raised, as in gpu.checks.exit_code.
FAILURES = {"node": NodeError, "user": ConfigError, "retry": RetryError}

GROUP_KEYS = {"model": " (model.model_name)"}
"""For a group of checks, the key of the run file that these checks read, as text for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The result of the pre-flight. In ``config``, every "auto" is replaced by a value. If
    ``device`` is None, the run is on the CPU.
    """

    config: RunConfig
    snapshot: NodeSnapshot
    device: Device | None
    sizing: SizingResult
    checks: tuple[CheckResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the content of preflight.json, which has the schema report.schema.json."""
        device = None if self.device is None else self.device.name
        run = {"device": device, "sizing": self.sizing.to_json()}
        return check_report(self.snapshot, self.checks, extra=run)

    def write(self, run_dir: Path) -> Path:
        """Write preflight.json. Raises OSError."""
        text = json.dumps(redact_tree(self.to_json()), indent=2, default=str) + "\n"
        return write_file(run_dir / "preflight.json", text)


def preflight(
    config: RunConfig,
    *,
    world_size: int = 1,
    raise_on_failure: bool = True,
    peers: Peers | None = None,
    check_rules: Checker | None = None,
) -> Preflight:
    """Inspect and check the node, and choose settings with which the run fits in memory. If
    ``raise_on_failure`` is False (``--dry-run``), a failed check does not stop the run.

    Every rank inspects its own GPU. All ranks are sized for the smallest GPU, so that they use the
    same settings. ``check_rules`` checks the run file for the device and the packages of this
    machine, as ``envcheck check`` does. The node is checked before the run file. Therefore a broken
    GPU is reported as an error of the node, and not of the run file.

    Raises:
        NodeError, RetryError, ConfigError: a check failed (see ``refuse_failed_checks``).
        ConfigError: a rule rejects the run file on this machine.
        ConfigError: the run does not fit in memory. The message lists changes that make the run
            fit, with the memory that each change saves.
    """
    snapshot = take_snapshot(
        paths={"output_dir": Path(config.runtime.output_dir)},
        model=config.model.model_name,
        revision=config.model.revision,
    )
    situation = local_situation(snapshot, gpu_index=local_rank(), world_size=world_size)
    template = chat_format.model_has_template(config.model.model_name, config.model.revision)
    run = resolve_run(config, situation, has_template=template)
    checks = tuple(run_checks(snapshot, check_context(run, snapshot)))
    if raise_on_failure:
        refuse_failed_checks(checks)
        if check_rules is not None:
            check_rules(situation)
    gpu = devices.select_device(snapshot, local_rank() if snapshot.gpus else None)
    device = None if gpu is None else Device.from_node(snapshot, gpu)
    devices_by_rank = [device] if peers is None else _devices_of_all(device, peers)
    config = dataclasses.replace(config, dataset=run.config.dataset)
    resolved, sizing, device = resolve_for_all(config, devices_by_rank, world_size=world_size)
    own_device = devices_by_rank[0 if peers is None else peers.rank]
    check_groups(
        parallel.parallel_size(resolved.model.tensor_parallel_size),
        None if own_device is None else own_device.name,
        partial(peers.exchange, "group") if peers is not None else lambda value: [value],
    )
    return Preflight(
        config=resolved, snapshot=snapshot, device=device, sizing=sizing, checks=checks
    )


def _devices_of_all(device: Device | None, peers: Peers) -> list[Device | None]:
    own_fields = None if device is None else dataclasses.asdict(device)
    by_rank = peers.exchange("device", own_fields)
    return [
        None
        if fields is None
        else Device(**{**fields, "compute_capability": tuple(fields["compute_capability"])})
        for fields in by_rank
    ]


def check_context(run: ResolvedRun, snapshot: NodeSnapshot | None = None) -> CheckContext:
    """Return the requirements of ``run`` on this node, as the input of the checks."""
    has_local_rank = "LOCAL_RANK" in os.environ and snapshot is not None
    visible_gpus = (
        len(devices.visible_devices(snapshot).devices)
        if has_local_rank and snapshot is not None
        else 0
    )
    return CheckContext(
        **run.machine_requirements(),
        world_size=local_world_size(),
        # If there is no GPU for this process, no GPU is inspected. A check then reports that there
        # are too few GPUs.
        gpu_index=local_rank() if local_rank() < visible_gpus else None,
        sizer_model_types=tuple(FAMILIES),
    )


def refuse_failed_checks(checks: tuple[CheckResult, ...]) -> None:
    """Raise the error of a failed check. If several checks failed, NodeError (the node's fault)
    comes first, then ConfigError (the user's fault), then RetryError.
    """
    failed = [check for check in checks if check.verdict == "fail"]
    kinds = list(FAILURES)
    for check in sorted(failed, key=lambda check: kinds.index(check.blame or "node")):
        raise FAILURES[check.blame or "node"](
            check.evidence,
            where=f"check {check.id}{GROUP_KEYS.get(check.id.partition('.')[0], '')}",
            fix=f"{check.remedy or 'correct what the check found'} "
            "(`envcheck check` runs all checks)",
        )
