"""The sizer's parameter counts are exactly those of transformers for the models of shapes.json."""

import json
from pathlib import Path

import pytest

from toolkit.sizing.spec import spec_from_values

pytestmark = pytest.mark.contract
SHAPES = json.loads((Path(__file__).parents[1] / "fixtures" / "sizing" / "shapes.json").read_text())


@pytest.mark.parametrize("shape", SHAPES, ids=[shape["id"] for shape in SHAPES])
def test_parameter_counts_are_those_of_the_meta_model(shape):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    # A quantized checkpoint has the parameter count of the model that is not quantized.
    values = {key: value for key, value in shape["config"].items() if key != "quantization_config"}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto = AutoModelForImageTextToText if config.model_type == "gemma3" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert spec_from_values(shape["config"], name=shape["id"]).parameters == counted


@pytest.mark.parametrize("shape", SHAPES, ids=[shape["id"] for shape in SHAPES])
def test_linears_are_modules_of_the_model(shape):
    """Every adapted module of the table exists under its name with its sizes. The LoRA counts
    depend on this.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    values = {key: value for key, value in shape["config"].items() if key != "quantization_config"}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto = AutoModelForImageTextToText if config.model_type == "gemma3" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    module_counts: dict[tuple[str, int, int], int] = {}
    for name, module in model.named_modules():
        _, _, name_in_layers = name.rpartition(".layers.")
        if isinstance(module, torch.nn.Linear) and "vision" not in name and "." in name_in_layers:
            key = (name_in_layers.partition(".")[2], module.out_features, module.in_features)
            module_counts[key] = module_counts.get(key, 0) + 1
    expected: dict[tuple[str, int, int], int] = {}
    for block in spec_from_values(shape["config"], name=shape["id"]).blocks:
        for linear in block.linears:
            if linear.copies == 1 and linear.leaf not in ("gate", "router", "conv1d"):
                key = (linear.name, linear.out_features, linear.in_features)
                expected[key] = expected.get(key, 0) + block.count
    assert {key: module_counts.get(key) for key in expected} == expected
