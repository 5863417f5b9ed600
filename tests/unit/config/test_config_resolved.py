"""A resolved run has the engine, the dtype and the requirements that follow from the run file and
the machine.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from toolkit.config.resolved import (
    DeviceFacts,
    Situation,
    is_vllm_installed,
    resolve_engine,
    resolve_run,
)
from toolkit.config.run_config import ModelSection, RunConfig, RuntimeSection

CPU = DeviceFacts("no GPU", None)
OLD, NEW, UNKNOWN_CAPABILITY = (DeviceFacts("card", c) for c in ((7, 5), (9, 0), (0, 0)))


def run(*, engine: Any = "auto", grpo: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelSection(model_name="org/name", **model),
        runtime=RuntimeSection(engine=engine),
        grpo=MappingProxyType(grpo or {}),
    )


@pytest.mark.parametrize(
    ("engine", "fast", "device", "vllm", "expected"),
    [
        ("vllm", "auto", CPU, False, "vllm"),
        ("transformers", True, NEW, True, "transformers"),
        ("auto", True, CPU, False, "vllm"),
        ("auto", False, NEW, True, "transformers"),
        ("auto", "auto", CPU, True, "transformers"),
        ("auto", "auto", NEW, True, "vllm"),
        ("auto", "auto", NEW, None, "vllm"),
        ("auto", "auto", NEW, False, "transformers"),
        ("auto", "auto", None, None, "maybe"),
        ("auto", "auto", None, False, "transformers"),
    ],
)
def test_the_engine_follows_the_run_file_and_the_machine(
    engine: str, fast: Any, device: Any, vllm: Any, expected: str
) -> None:
    assert resolve_engine(engine, fast, Situation(device=device, vllm=vllm)) == expected


@pytest.mark.parametrize(
    ("device", "grpo", "model", "dtype"),
    [
        (None, {"fp16": True}, {}, "auto"),
        (NEW, {}, {}, "bfloat16"),
        (UNKNOWN_CAPABILITY, {}, {}, "bfloat16"),
        (OLD, {}, {}, "float16"),
        (OLD, {}, {"load_in_16bit": True}, "float16"),
        (NEW, {"fp16": True}, {}, "float16"),
        (OLD, {"bf16": True}, {}, "bfloat16"),
        (CPU, {}, {}, "float32"),
        (CPU, {"bf16": True}, {}, "bfloat16"),
        (CPU, {}, {"load_in_16bit": True}, "bfloat16"),
        (NEW, {"fp16": True}, {"dtype": "float32"}, "float32"),
    ],
)
def test_auto_dtype_becomes_the_dtype_of_the_run(
    device: Any, grpo: Any, model: Any, dtype: str
) -> None:
    resolved = resolve_run(run(grpo=grpo, **model), Situation(device=device))
    assert (resolved.dtype, resolved.config.model.dtype) == (dtype, dtype)


def test_resolving_twice_gives_the_same() -> None:
    situation = Situation(world_size=2, device=NEW, vllm=True)
    once = resolve_run(run(), situation, targets=("q_proj",))
    assert once.config.lora.target_modules == once.targets == ("q_proj",)
    assert once.config.model.fast_inference is True
    again = resolve_run(once.config, situation, targets=("o_proj",))
    assert replace(again, requested_dtype=once.requested_dtype) == once


@pytest.mark.parametrize(
    ("engine", "size", "replicas"),
    [("vllm", 2, 2), ("vllm", 4, 1), ("vllm", "auto", 4), ("vllm", 3, 4), ("transformers", 2, 4)],
)
def test_processes_that_share_a_model_are_one_replica(
    engine: str, size: Any, replicas: int
) -> None:
    situation = Situation(world_size=4, device=NEW, vllm=True)
    resolved = resolve_run(run(engine=engine, tensor_parallel_size=size), situation)
    assert (resolved.world_size, resolved.replicas) == (4, replicas)


def test_requirements_have_vllm_settings_only_with_the_vllm_engine() -> None:
    settings = {"gpu_memory_utilization": 0.7, "float8_kv_cache": True, "tensor_parallel_size": 2}
    situation = Situation(device=NEW, vllm=True)
    with_vllm = resolve_run(run(engine="vllm", **settings), situation).machine_requirements()
    without = resolve_run(run(engine="transformers", **settings), situation).machine_requirements()
    assert {name: with_vllm[name] for name in settings} == settings
    assert without["gpu_memory_utilization"] is None
    assert without["float8_kv_cache"] is False
    assert without["tensor_parallel_size"] == 1
    assert (
        resolve_run(run(fast_inference=False), Situation()).machine_requirements()["engine"]
        == "transformers"
    )
    assert resolve_run(run(), Situation()).machine_requirements()["engine"] == "auto"


def test_requirements_have_the_dtype_of_the_run_file() -> None:
    situation = Situation(device=NEW)
    assert resolve_run(run(), situation).machine_requirements()["dtype"] == "auto"
    assert (
        resolve_run(run(grpo={"bf16": True}), situation).machine_requirements()["dtype"]
        == "bfloat16"
    )


@pytest.mark.parametrize(
    ("installed", "expected"), [({"torch", "vllm"}, True), ({"torch"}, False), (set(), None)]
)
def test_vllm_is_unknown_without_torch(
    installed: set[str], expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "toolkit.config.resolved.find_spec", lambda name: object() if name in installed else None
    )
    assert is_vllm_installed() is expected
