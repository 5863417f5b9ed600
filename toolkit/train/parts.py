"""What a run is made of, what it says before it starts, and what it leaves when it ends."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from toolkit.base.paths import write_file
from toolkit.base.units import format_bytes, format_parameters
from toolkit.policy.adapter_io import save_lora
from toolkit.policy.from_config import choose_engine
from toolkit.train import manifest
from toolkit.train.evaluate import plan
from toolkit.train.progress import number
from toolkit.train.ranks import world_size
from toolkit.train.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.model import RunConfig
    from toolkit.train.data import Data
    from toolkit.train.evaluate import Evaluation
    from toolkit.train.preflight import Preflight
    from toolkit.train.rewards import Rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the run talks and what it does besides training. ``evaluate`` None: as the run file says
    (``train.evaluate.evaluates``).
    """

    out: TextIO = field(default_factory=lambda: sys.stdout)
    evaluate: bool | None = None
    debug: bool = False


@dataclass(slots=True)
class Parts:
    """What a run is made of, once everything that can be refused has been."""

    config: RunConfig
    run_dir: Path
    preflight: Preflight
    model: Any
    tokenizer: Any
    data: Data
    rewards: Rewards
    digests: dict[str, str]


def introduce(parts: Parts, seed: int, found: Path | None, options: Options) -> None:
    """Say what runs, before it does; write the manifest."""
    config, sizing = parts.config, parts.preflight.sizing
    seeds = {"grpo.seed": seed, "lora.random_state": config.lora.random_state}
    manifest.write_manifest(
        parts.run_dir,
        seeds=seeds,
        data=parts.digests,
        world_size=world_size(),
        source=config.source,
        snapshot=parts.preflight.snapshot,
    )
    place = parts.preflight.device.name if parts.preflight.device else "CPU"
    lines = [
        f"model    {config.model.model_name}"
        f" ({format_parameters(sizing.model.parameters)} parameters,"
        f" {format_bytes(sizing.model.weight_bytes)})",
        f"adapter  r {config.lora.r},"
        f" {format_parameters(sizing.model.trainable_parameters)} parameters",
        f"engine   {choose_engine(config)} on {place}"
        + (f", {world_size()} processes" if world_size() > 1 else ""),
        *(f"data     {line}" for line in parts.data.report.lines()),
        f"folder   {parts.run_dir}",
    ]
    if parts.data.eval is not None:
        lines.insert(-1, f"held out {plan(config, options.evaluate)}")
    if found is not None:
        lines.append(f"resume   {found}")
    options.out.write("\n".join(lines) + "\n")
    options.out.flush()


def finish(parts: Parts, before: Evaluation | None, after: Evaluation | None, out: TextIO) -> None:
    """The adapter, the evaluation and the report, and where they lie."""
    adapter = save_lora(parts.model, parts.run_dir / "adapter")
    if before is not None and after is not None:
        described = {"before": before.to_json(), "after": after.to_json()}
        write_file(parts.run_dir / "evaluation.json", json.dumps(described, indent=2) + "\n")
        for name, value in after.rewards.items():
            then, now = (number(one, ".3f") for one in (before.rewards[name], value))
            out.write(f"held out {name} {then} -> {now} ({after.count} prompts)\n")
    report = write_report(parts.run_dir)
    out.write(f"adapter  {adapter}\nreport   {report}\n")
    out.flush()
