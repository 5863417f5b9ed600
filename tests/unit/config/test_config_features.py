"""The table of supported features, for configs of real model families and for edge cases."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.config.libraries import model_type
from toolkit.config.lora_targets import layers_beyond
from toolkit.config.supported_features import (
    attention_machine_problem,
    cpu_engine_problem,
    storage_format,
    storage_problem,
    untied_head_problem,
)

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("stored", "four", "eight", "engine", "key"),
    [
        (None, True, False, True, None),
        (NF4, True, False, True, None),
        (NF4, False, False, False, "model.load_in_4bit"),
        (NF4, True, True, False, "model.load_in_8bit"),
        (INT8, False, True, False, None),
        (INT8, True, False, False, "model.load_in_8bit"),
        (INT8, False, True, True, "model.model_name"),
        ({"quant_method": "gptq"}, True, False, False, "model.model_name"),
        ({}, True, False, False, "model.model_name"),
    ],
)
def test_stored_formats_and_flags(
    stored: Any, four: bool, eight: bool, engine: bool, key: str | None
) -> None:
    config = {"quantization_config": stored}
    problem = storage_problem(config, load_in_4bit=four, load_in_8bit=eight, engine=engine)
    assert (problem and problem.key) == key
    if problem:
        stored_name = storage_format(config)
        assert stored_name is not None
        assert stored_name.name in problem.message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"head_dim": 16}, "heads have size 16"),
        ({"hidden_size": 64, "num_attention_heads": 4}, "heads have size 16"),
        ({"hidden_size": 64, "num_attention_heads": 2}, None),
        ({"hidden_size": 64, "num_attention_heads": 0}, None),
        ({"kv_lora_rank": 8, "head_dim": 16}, None),
        ({"head_dim": 64, "num_experts": 4, "hidden_act": "relu2"}, "experts with relu2"),
        ({"head_dim": 64, "num_experts": 4, "hidden_act": "silu"}, None),
        ({"model_type": "gpt_oss", "head_dim": 64, "num_local_experts": 4}, "biases"),
    ],
)
def test_models_that_the_cpu_engine_refuses(config: dict[str, Any], expected: str | None) -> None:
    problem = cpu_engine_problem(config)
    assert (
        (problem is None)
        if expected is None
        else (problem is not None and expected in problem.message)
    )


@pytest.mark.parametrize(
    ("layers", "beyond"),
    [([0, 9], (9,)), (2, (2,)), (1, ()), (-1, (-1,)), (None, ()), ((0, 1), ())],
)
def test_layers_beyond_the_last_are_found(layers: Any, beyond: tuple[int, ...]) -> None:
    assert layers_beyond(layers, 2) == beyond
    assert layers_beyond(layers, None) == ()


def test_requirements_of_flash_and_flex_attention() -> None:
    supported = {"on_gpu": True, "dtype": "bfloat16", "is_installed": True}
    assert attention_machine_problem("flash_attention_2", **supported) is None
    assert (
        attention_machine_problem("sdpa", on_gpu=False, dtype="float32", is_installed=False) is None
    )
    for change in ({"on_gpu": False}, {"dtype": "float32"}, {"is_installed": False}):
        assert attention_machine_problem("flash_attention_2", **{**supported, **change}) is not None
    assert attention_machine_problem("flex_attention", **supported) is None
    assert attention_machine_problem("flex_attention", **{**supported, "on_gpu": False}) is not None


def test_the_installed_transformers_is_read_as_text() -> None:
    llama, t5 = model_type("llama"), model_type("t5")
    assert (llama.is_known, llama.is_causal) == (True, True)
    assert llama.attention_support == {"sdpa": True, "flash": True, "flex": True}
    assert (t5.is_known, t5.is_causal) == (True, False)
    assert model_type("gpt_oss").attention_support["sdpa"] is False
    # gemma3_text is defined in the module of gemma3.
    assert model_type("gemma3_text").attention_support["sdpa"] is True
    assert model_type("never_heard_of")[:2] == (False, False)
    assert model_type("../../x").attention_support == {}


@pytest.mark.parametrize(
    ("family", "tied", "is_refused"),
    [
        ("gemma2", False, True),
        ("gemma2", True, False),
        ("gemma2", None, False),
        ("llama", False, False),
    ],
)
def test_a_separate_lm_head_is_refused_for_gemma_2(
    family: str, tied: bool | None, is_refused: bool
) -> None:
    config = {"model_type": family} | ({} if tied is None else {"tie_word_embeddings": tied})
    assert (untied_head_problem(config) is not None) is is_refused
