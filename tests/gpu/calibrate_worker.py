"""Run one engine of the calibration matrix in its own process: see calibrate_matrix.py."""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calibrate_measure import terms_of, train

from toolkit.base.errors import ToolkitError
from toolkit.config.run_config import (
    SEVEN_PROJECTIONS,
    LoraSection,
    ModelSection,
    RunConfig,
    RuntimeSection,
)
from toolkit.sizing import Device, SizingResult, read_spec, solve
from toolkit.sizing.calibrate import MEASURED_TERMS


def run_config(case: dict[str, Any], run: dict[str, Any], folder: Path) -> RunConfig:
    """The run file of one run of the matrix."""
    batch = run["rows"] or max(run["micro"], 2)
    grpo = {
        "per_device_train_batch_size": run["micro"],
        "gradient_accumulation_steps": batch // run["micro"],
        "num_generations": batch,
        "max_prompt_length": min(run["prompt"], run["length"] // 2)
        if run["tokens"] is None
        else run["prompt"],
    }
    grpo["max_completion_length"] = run["length"] - grpo["max_prompt_length"]
    return RunConfig(
        model=ModelSection(
            model_name=str(folder),
            max_seq_length=case["max_length"],
            load_in_4bit=case["four_bit"],
            max_lora_rank=case["max_lora_rank"],
            enforce_eager=case["eager"],
            max_num_seqs=case["max_num_seqs"],
            max_num_batched_tokens=8192,
            enable_sleep_mode=case["sleep"],
            fast_inference=True,
        ),
        lora=LoraSection(
            r=run["r"], lora_alpha=run["r"], use_gradient_checkpointing=run["checkpointing"]
        ),
        grpo=MappingProxyType(grpo),
        runtime=RuntimeSection(
            engine="vllm",
            pack_tokens=run["tokens"] or "auto",
            fused_kernels="auto" if case["fused"] else False,
        ),
    )


def open_model(case: dict[str, Any], folder: Path, result: SizingResult) -> Any:
    """The shared model on an engine with the options that sizing chose."""
    from toolkit import FastLanguageModel

    choice = result.choice
    kv_cache_option = (
        {} if choice.kv_cache_bytes is None else {"kv_cache_bytes": choice.kv_cache_bytes}
    )
    return FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=case["max_length"],
        load_in_4bit=case["four_bit"],
        fast_inference=True,
        max_lora_rank=case["max_lora_rank"],
        gpu_memory_utilization=choice.gpu_memory_utilization or 0.5,
        enforce_eager=case["eager"],
        enable_sleep_mode=case["sleep"],
        fused_kernels="auto" if case["fused"] else False,
        max_num_seqs=choice.max_num_seqs,
        max_num_batched_tokens=choice.max_num_batched_tokens,
        dequantized_rollouts=choice.dequantized_rollouts,
        **kv_cache_option,
    )


def main(request: str, results: str, work_folder: str) -> None:
    """Open the engine, train its runs, and append one line for each."""
    case, work = json.loads(request), Path(work_folder)
    started = time.monotonic()
    from calibrate_matrix import append

    from toolkit.engine.engine_memory import engine_memory
    from toolkit.gpu.devices import select_device
    from toolkit.gpu.snapshot import take_snapshot
    from toolkit.policy.cuda_allocator import use_expandable_segments
    from toolkit.train.bench.shapes import make_checkpoint

    use_expandable_segments()  # loading does this too late: the checkpoint is created on the card
    snapshot = take_snapshot()
    gpu = select_device(snapshot)
    device = None if gpu is None else Device.from_node(snapshot, gpu)
    folder = make_checkpoint(case["shape"], work / case["shape"])
    free_gpu_memory()
    spec = read_spec(str(folder))
    configs = [run_config(case, run, folder) for run in case["runs"]]
    sized = [solve(config, spec, device) for config in configs]
    # The engine is sized for the run that leaves it the least memory. Runs that do not fit are
    # skipped.
    fitting = [result for result in sized if result.feasible]
    largest = min(fitting, key=lambda result: result.interval.max or 0)
    model, tokenizer = open_model(case, folder, largest)
    engine = model.toolkit_engine
    where = {
        "engine": case["name"],
        "device": device.name if device else "the CPU",
        "load_s": round(time.monotonic() - started, 1),
    }
    names = tuple(name for name in MEASURED_TERMS if name.startswith("engine."))
    terms = terms_of(largest, engine_memory(engine.llm), names)
    append(Path(results), {**where, "run": "engine", "terms": terms})
    for run, config in zip(case["runs"], configs, strict=True):
        train_one_run(
            run, config, (model, tokenizer), (spec, device, largest), Path(results), where
        )
    engine.close()


def free_gpu_memory() -> None:
    """Free the cached memory, so that the next step finds the card as empty as sizing assumes."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_one_run(
    run: dict[str, Any],
    config: RunConfig,
    loaded: Any,
    sizing: Any,
    results: Path,
    where: dict[str, Any],
) -> None:
    """Train one run on the open engine and append its line, which has the error if the run
    fails.
    """
    import torch
    from calibrate_matrix import Run, append

    from toolkit import FastLanguageModel
    from toolkit.policy.model_attributes import add_toolkit_attributes
    from toolkit.policy.shared_weights import shared_model

    spec, device, largest = sizing
    row: dict[str, Any] = {**where, "run": Run(**run).name}
    choice = largest.choice
    if choice.gpu_memory_utilization is not None:
        engine = {
            "gpu_memory_utilization": choice.gpu_memory_utilization,
            "dequantized_rollouts": choice.dequantized_rollouts,
        }
        config = replace(config, model=replace(config.model, **engine))
    result = solve(config, spec, device)
    if not result.feasible:
        append(results, {**row, "terms": [], "skipped": "sizing says that it does not fit"})
        return
    model, tokenizer = loaded
    base = add_toolkit_attributes(shared_model(model.toolkit_engine, check=False), copy_from=model)
    policy = FastLanguageModel.get_peft_model(
        base,
        r=run["r"],
        lora_alpha=run["r"],
        target_modules=list(SEVEN_PROJECTIONS),
        use_gradient_checkpointing=run["checkpointing"],
    )
    start = time.monotonic()
    try:
        measured = train(policy, tokenizer, config, results.parent)
        names = ("trainer.step", "peak.rollout", "peak.training")
        is_largest = result.peaks == largest.peaks
        row["terms"] = terms_of(result, measured, names, sized_for_it=is_largest)
    except (torch.cuda.OutOfMemoryError, MemoryError, ToolkitError) as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    append(results, {**row, "train_s": round(time.monotonic() - start, 1)})
    del policy, base
    free_gpu_memory()


if __name__ == "__main__":
    main(*sys.argv[1:4])
