"""The parts of a run, the lines that are printed before the run, and the files that are written at
its end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from toolkit.base.formatting import format_bytes, format_parameters
from toolkit.base.paths import write_file
from toolkit.config import parallel
from toolkit.gpu import devices
from toolkit.policy.adapter_io import save_lora
from toolkit.policy.from_config import choose_engine
from toolkit.policy.merged_export import write_model
from toolkit.train.checkpointing.checkpoint import tensor_parallel_size_of
from toolkit.train.process_control import world_size
from toolkit.train.report import manifest, write_report
from toolkit.train.report.progress import format_number
from toolkit.train.rollout.evaluate import describe_evaluation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from toolkit.config.run_config import RunConfig
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot
    from toolkit.sizing.result import SizingResult
    from toolkit.train.data.dataset import Data
    from toolkit.train.preflight import Checker, Preflight
    from toolkit.train.rewards import Rewards
    from toolkit.train.rollout.evaluate import Evaluation


FREE_SHARE = 0.9
"""A GPU counts as free if at least this share of its memory is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a run that are not in its run file.

    ``out`` is the stream to which the run prints its text. ``evaluate`` says whether the run
    evaluates. If it is None, the run file decides (``rollout.evaluate.should_evaluate``).
    ``check_rules`` is a function that checks the run file for this machine. If it is None, the run
    file is not checked.
    """

    out: TextIO = field(default_factory=lambda: sys.stdout)
    evaluate: bool | None = None
    debug: bool = False
    check_rules: Checker | None = None


@dataclass(slots=True)
class RunContext:
    """The loaded parts of a run that passed all checks."""

    config: RunConfig
    run_dir: Path
    preflight: Preflight
    model: Any
    tokenizer: Any
    data: Data
    rewards: Rewards
    digests: dict[str, str]
    tools: list[Any] = field(default_factory=list)
    episodes: Callable[[], Any] | None = None


def print_run_description(
    context: RunContext, seed: int, resumed: Path | None, options: Options
) -> None:
    """Print a description of the run before it starts, and write the manifest."""
    config, sizing = context.config, context.preflight.sizing
    seeds = {"grpo.seed": seed, "lora.random_state": config.lora.random_state}
    manifest.write_manifest(
        context.run_dir,
        seeds=seeds,
        data=context.digests,
        world_size=world_size(),
        source=config.source,
        snapshot=context.preflight.snapshot,
    )
    device_name = context.preflight.device.name if context.preflight.device else "CPU"
    parameters = f"{format_parameters(sizing.model.trainable_parameters)} parameters"
    lines = [
        f"model    {config.model.model_name}"
        f" ({format_parameters(sizing.model.parameters)} parameters,"
        f" {format_bytes(sizing.model.weight_bytes)})",
        "adapter  none: every weight is trained"
        if config.model.full_finetuning
        else f"adapter  r {config.lora.r}, {parameters}",
        f"engine   {choose_engine(config)} on {device_name}"
        + (f", {world_size()} processes" if world_size() > 1 else "")
        + _model_groups_text(config),
        *_weight_copies_lines(context.preflight.sizing),
        *(f"gpus     {line}" for line in unused_gpus(context.preflight.snapshot)),
        *(f"data     {line}" for line in context.data.report.lines()),
        f"folder   {context.run_dir}",
    ]
    if context.data.eval is not None:
        lines.insert(-1, f"held out {describe_evaluation(config, options.evaluate)}")
    if resumed is not None:
        lines.append(f"resume   {resumed}")
        size, recorded_size = (
            parallel.parallel_size(config.model.tensor_parallel_size),
            tensor_parallel_size_of(resumed),
        )
        if size != recorded_size:
            lines.append(
                f"         written with tensor_parallel_size {recorded_size}, now {size}: "
                "results are equal up to rounding"
            )
    options.out.write("\n".join(lines) + "\n")
    options.out.flush()


def _weight_copies_lines(sizing: SizingResult) -> list[str]:
    """Return a list with one line about the engine's 16-bit copies of 4-bit weights: their size, or
    the reason why some weights have no copy. If the weights are not 4-bit, the list is empty.
    """
    if sizing.engine.copies_note is not None:
        return [f"rollouts {sizing.engine.copies_note}"]
    copies = sizing.engine.copies_bytes
    return [f"rollouts {format_bytes(copies)} of 16-bit copies of 4-bit weights"] if copies else []


def _model_groups_text(config: RunConfig) -> str:
    """Return a text about the groups of processes that share a model (tensor parallelism). It is
    empty if each process has its own model.
    """
    size = parallel.parallel_size(config.model.tensor_parallel_size)
    if size == 1:
        return ""
    replicas = parallel.count_replicas(world_size(), size)
    return (
        f": {replicas} groups of {size} that share a model"
        if replicas > 1
        else " that share a model"
    )


def unused_gpus(snapshot: NodeSnapshot) -> list[str]:
    """A list with one line about the visible GPUs that the run does not use. It is empty if there
    are no such GPUs, or if the run has several processes.
    """
    visible = devices.visible_devices(snapshot).devices
    if world_size() > 1 or len(visible) < 2:
        return []
    free_count = sum(map(is_free, visible[1:]))
    text = f"uses GPU 0 of {len(visible)} visible GPUs; {free_count} of the others are free"
    if free_count == len(visible) - 1:
        return [f"{text}; use --nproc-per-node auto to train on all {len(visible)}"]
    if free_count:
        fix = "list the free ones in CUDA_VISIBLE_DEVICES and add --nproc-per-node auto"
        return [f"{text}; to use several, {fix}"]
    return [text]


def is_free(gpu: GpuSnapshot) -> bool:
    """True if nearly all memory of ``gpu`` is free."""
    free, total = gpu.free_bytes, gpu.total_bytes
    return bool(free is not None and total and free >= FREE_SHARE * total)


def write_results(
    context: RunContext,
    before: Evaluation | None,
    after: Evaluation | None,
    out: TextIO,
    base_check: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter, the evaluation and the report, and print their results and paths. With
    full fine-tuning, write the model instead of the adapter. ``base_check`` is the result of
    the trainer's check of the base weights, which is added to the manifest.
    """
    if base_check is not None:
        manifest.add_entries(context.run_dir, base=dict(base_check))
    if context.config.model.full_finetuning:
        result_line = (
            f"model    {write_model(context.model, context.tokenizer, context.run_dir / 'model')}"
        )
    else:
        result_line = f"adapter  {save_lora(context.model, context.run_dir / 'adapter')}"
    if before is not None and after is not None:
        evaluation = {"before": before.to_json(), "after": after.to_json()}
        write_file(context.run_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        for name, value in after.rewards.items():
            value_before, value_after = (
                format_number(reward, ".3f") for reward in (before.rewards[name], value)
            )
            out.write(f"held out {name} {value_before} -> {value_after} ({after.count} prompts)\n")
    report = write_report(context.run_dir)
    out.write(f"{result_line}\nreport   {report}\n")
    out.flush()
