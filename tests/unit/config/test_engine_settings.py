"""Each engine option is defined once. The run file, the drop-in API, the schema and the arguments
of vLLM agree with the definition.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from toolkit import FastLanguageModel
from toolkit.config import find_schema
from toolkit.config.engine_settings import API_OPTIONS, OPTIONS, schema_properties
from toolkit.config.run_config import ModelSection
from toolkit.engine.engine_options import EngineOptions

MODEL_PROPERTIES = find_schema("run")["properties"]["model"]["properties"]


def test_the_schema_and_the_run_file_have_every_option() -> None:
    assert {name: MODEL_PROPERTIES[name] for name in OPTIONS} == schema_properties()
    assert set(OPTIONS) < {item.name for item in dataclasses.fields(ModelSection)}
    assert set(MODEL_PROPERTIES) == {item.name for item in dataclasses.fields(ModelSection)}


@pytest.mark.parametrize("name", API_OPTIONS)
def test_from_pretrained_accepts_an_option(name: str) -> None:
    parameters = inspect.signature(FastLanguageModel.from_pretrained).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    assert name in parameters or takes_any


@pytest.mark.parametrize(
    "name", [name for name, option in API_OPTIONS.items() if option.vllm_argument]
)
def test_an_option_is_passed_to_vllm(name: str) -> None:
    option = API_OPTIONS[name]
    value = {"switch": True, "count": 3, "share": 0.25, "rank": 32, "any": 7, "amount": 4}[
        option.kind
    ]
    options = EngineOptions(model="m", **{name: value})
    arguments = options.to_vllm("cuda")
    assert arguments[option.vllm_argument] == (
        option.vllm_values.get(value, value) if option.vllm_values else value
    )
    assert (option.vllm_argument in options.to_vllm("cpu")) is (not option.gpu_only)
