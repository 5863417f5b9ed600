"""The sizer chooses the settings of the toolkit's arm of the benchmark. They need no more memory
than the other arms.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from toolkit.gpu.cards import find_card
from toolkit.sizing import Device, read_spec
from toolkit.train.bench import bench_plan
from toolkit.train.bench.arm_settings import WORKLOADS, Settings
from toolkit.train.bench.shapes import SHAPES

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.sizing.model_blocks import ModelSpec

CONFIG = {
    **SHAPES["llama-1b"].config,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
}


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return read_spec(str(tmp_path))


def _device(name: str) -> Device:
    card = find_card(name)
    assert card is not None
    return Device.from_card(card)


@pytest.mark.parametrize("card", ["h100", "h200", "l40s"])
@pytest.mark.parametrize("batch", [4, 16])
def test_the_plan_needs_no_more_memory_than_the_other_arms(
    spec: ModelSpec, card: str, batch: int
) -> None:
    device, given = _device(card), Settings(model="m", per_device_batch=batch)
    by_hand = replace(given, ours_batch=batch, ours_checkpointing=True, ours_sleep=False)
    filled = bench_plan.choose_settings(given, spec, device)
    ours, theirs = (
        bench_plan.solve_settings(filled, spec, device),
        bench_plan.solve_settings(by_hand, spec, device),
    )
    assert ours.peaks.torch_bytes <= bench_plan.other_arms_peak_bytes(given, spec, device)
    assert bench_plan.other_arms_peak_bytes(given, spec, device) <= theirs.peaks.torch_bytes
    assert ours.trainer.step_s_estimate < theirs.trainer.step_s_estimate
    assert filled.ours_batch is not None
    assert filled.ours_tokens is not None
    # The passes are fewer and larger, because the small KV cache leaves memory for them.
    assert filled.ours_tokens > batch * 320
    assert filled.sequences % filled.ours_batch == 0
    assert filled.ours_engine is not None
    share = filled.ours_engine["gpu_memory_utilization"]
    assert share <= given.gpu_memory_utilization
    assert f"gpu_memory_utilization {share:g}" in filled.plan_text
    # The KV cache holds all sequences of a step, and little more.
    cache = share * device.cuda_total_bytes - (
        ours.interval.min * device.cuda_total_bytes - ours.engine.kv_sequence_bytes
    )
    assert ours.engine.kv_wanted_bytes <= cache
    assert cache <= ours.engine.kv_wanted_bytes + 0.03 * device.cuda_total_bytes


def test_a_group_with_a_long_context_is_one_pass_with_one_copy_of_the_prompt(
    spec: ModelSpec,
) -> None:
    given = Settings(model="m", **WORKLOADS["long-context"])
    filled = bench_plan.choose_settings(given, spec, _device("h100"))
    assert filled.ours_tokens == 16384 + 8 * 2048
    assert "passes of at most 32,768 tokens" in filled.plan_text
    # The engine stores one copy of the prompt, and 16-bit copies of the 4-bit weights fit.
    ours = bench_plan.solve_settings(filled, spec, _device("h100"))
    completions = 8 * (2048 + 16) * ours.model.kv_bytes_per_token
    assert ours.engine.kv_wanted_bytes <= 16384 * ours.model.kv_bytes_per_token + completions
    assert filled.ours_engine is not None
    assert filled.ours_engine["dequantized_rollouts"] is True
    assert filled.ours_engine["gpu_memory_utilization"] < given.gpu_memory_utilization / 2


def test_gpu_memory_utilization_is_at_most_that_of_the_other_arms(spec: ModelSpec) -> None:
    given = Settings(model="m", gpu_memory_utilization=0.02)
    filled = bench_plan.choose_settings(given, spec, _device("h200"))
    assert filled.ours_engine is None or filled.ours_engine["gpu_memory_utilization"] <= 0.02


def test_set_values_are_kept_and_a_cpu_gets_the_settings_of_the_other_arms(spec: ModelSpec) -> None:
    written = Settings(
        model="m", ours_batch=8, ours_checkpointing=False, ours_sleep=False, ours_engine={}
    )
    assert bench_plan.choose_settings(written, spec, _device("h100")) == written
    plain = bench_plan.choose_settings(Settings(model="m"), spec, None)
    assert plain.plan_text == "micro-batch 16 x 4, checkpointing, KV cache kept"
