"""Shapes of real models, and run files around them."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from toolkit.config.run_config import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.gpu import cards
from toolkit.sizing import Device
from toolkit.sizing.spec import spec_from_values

FIXTURE = Path(__file__).parents[2] / "fixtures" / "sizing" / "shapes.json"
SHAPES = {shape["id"]: shape for shape in json.loads(FIXTURE.read_text())}


def pytest_generate_tests(metafunc):
    """``shape``: every row of the table."""
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


@pytest.fixture(scope="session")
def spec_of():
    """The spec of a hub id of the table."""

    def make(name: str) -> Any:
        return spec_from_values(SHAPES[name]["config"], name=name)

    return make


@pytest.fixture(scope="session")
def card():
    """An empty card by name."""
    return lambda name: Device.from_card(cards.find_card(name))


@pytest.fixture(scope="session")
def run():
    """A run file from flat keyword arguments; grpo's are dicts."""

    def make(grpo: dict[str, Any] | None = None, **values: Any) -> RunConfig:
        lora = {"r": values.pop("r", 16)}
        if "checkpointing" in values:
            lora["use_gradient_checkpointing"] = values.pop("checkpointing")
        if "targets" in values:
            lora["target_modules"] = values.pop("targets")
        runtime = {"engine": values.pop("engine", "vllm")}
        for key in ("padding_free", "fused_kernels", "pack_tokens"):
            if key in values:
                runtime[key] = values.pop(key)
        model = {"model_name": "any", "max_seq_length": 1024, **values}
        defaults = {"max_completion_length": 512, "max_prompt_length": 512}
        return RunConfig(
            model=ModelSection(**model),
            lora=LoraSection(**lora),
            grpo=MappingProxyType({**defaults, **(grpo or {})}),
            runtime=RuntimeSection(**runtime),
        )

    return make


@pytest.fixture(scope="session")
def all_shapes():
    """Every row of the table by hub id."""
    return SHAPES
