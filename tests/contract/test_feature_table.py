"""The table of supported features agrees with the installed transformers and vLLM."""

from __future__ import annotations

import pytest

from toolkit.config.libraries import model_type
from toolkit.config.supported_features import (
    ATTENTION_FUNCTIONS,
    CPU_HEAD_SIZES,
    MULTIMODAL,
    NO_FLOAT16_TYPES,
)

pytestmark = pytest.mark.contract


def test_attention_functions_of_transformers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    recorded = {
        *ATTENTION_FUNCTIONS,
        *(f"paged|{name}" for name in ATTENTION_FUNCTIONS if name != "flex_attention"),
    }
    # vLLM and packed attention also register functions, if this process has used them.
    not_from_transformers = ("packed_", "vllm")
    registered = {n for n in ALL_ATTENTION_FUNCTIONS if not n.startswith(not_from_transformers)}
    assert {*registered, "eager"} == recorded


@pytest.mark.filterwarnings("ignore")
def test_the_multimodal_types_have_a_separate_text_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    multimodal = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert model_type(name).is_causal, name
        if name.startswith("musicgen"):
            continue  # its config cannot be created without the configs of its parts
        config = CONFIG_MAPPING[name]()
        if config.get_text_config() is not config:
            multimodal.add(name)
    assert multimodal == MULTIMODAL


@pytest.mark.engine
def test_head_sizes_of_the_cpu_engine() -> None:
    attention = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    assert tuple(attention.CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES


@pytest.mark.engine
def test_models_that_overflow_in_float16() -> None:
    model = pytest.importorskip("vllm.config.model")
    assert set(model._FLOAT16_NOT_SUPPORTED_MODELS) == NO_FLOAT16_TYPES
