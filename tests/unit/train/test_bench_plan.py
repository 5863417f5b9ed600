"""Our arm of the benchmark is cut by sizing, within the memory of what the peers are given."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from toolkit.gpu.cards import find
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
    card = find(name)
    assert card is not None
    return Device.from_card(card)


@pytest.mark.parametrize("card", ["h100", "h200", "l40s"])
@pytest.mark.parametrize("batch", [4, 16])
def test_no_more_memory_than_the_setting_by_hand(spec: ModelSpec, card: str, batch: int) -> None:
    device, given = _device(card), Settings(model="m", per_device_batch=batch)
    by_hand = replace(given, ours_batch=batch, ours_checkpointing=True, ours_sleep=False)
    filled = bench_plan.fill(given, spec, device)
    ours, theirs = bench_plan.size(filled, spec, device), bench_plan.size(by_hand, spec, device)
    assert ours.peaks.torch_bytes <= bench_plan.peers_bytes(given, spec, device)
    assert bench_plan.peers_bytes(given, spec, device) <= theirs.peaks.torch_bytes
    assert ours.trainer.step_s_estimate < theirs.trainer.step_s_estimate
    assert filled.ours_batch is not None
    assert filled.ours_tokens is not None
    assert filled.ours_tokens > batch * 320  # fewer and larger ones: the sleeping cache makes room
    assert filled.sequences % filled.ours_batch == 0


def test_a_long_context_is_one_pass_with_its_prompt_once(spec: ModelSpec) -> None:
    given = Settings(model="m", **WORKLOADS["long-context"])
    filled = bench_plan.fill(given, spec, _device("h100"))
    assert filled.ours_tokens == 16384 + 8 * 2048
    assert "passes of at most 32,768 tokens" in filled.ours_plan


def test_what_is_written_stays_and_a_cpu_gets_the_setting_by_hand(spec: ModelSpec) -> None:
    written = Settings(model="m", ours_batch=8, ours_checkpointing=False, ours_sleep=False)
    assert bench_plan.fill(written, spec, _device("h100")) == written
    plain = bench_plan.fill(Settings(model="m"), spec, None)
    assert plain.ours_plan == "micro-batch 16 x 4, checkpointing, KV cache kept"
