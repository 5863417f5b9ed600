"""Fixtures: the configs of real models from shapes.json, cards, and run files."""

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
    """Run a test with the argument ``shape`` once for each row of shapes.json."""
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


@pytest.fixture(scope="session")
def spec_of():
    """A function from a hub id in shapes.json to the spec of the model."""

    def make(name: str) -> Any:
        return spec_from_values(SHAPES[name]["config"], name=name)

    return make


@pytest.fixture(scope="session")
def card():
    """A function from the name of a card to the card with all of its memory free."""
    return lambda name: Device.from_card(cards.find_card(name))


@pytest.fixture(scope="session")
def run():
    """A function that creates a run config. The section grpo is a dict; the keys of all other
    sections are keyword arguments.
    """

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
    """All rows of shapes.json by hub id."""
    return SHAPES
