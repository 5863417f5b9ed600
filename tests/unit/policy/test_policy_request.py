"""Every parameter of from_pretrained is applied or refused by name, before a model is loaded."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest

from toolkit.base.errors import (
    ConfigTypeError,
    ConfigValueError,
    MissingExtraError,
    UnsupportedError,
)
from toolkit.policy import load_request
from toolkit.policy.load_arguments import ENGINE_DEFAULTS, REFUSED_ARGUMENTS
from toolkit.policy.load_request import check_request

VALID_ARGUMENTS = {"model_name": "m", "load_in_4bit": False}
SIGNATURE = {
    "max_seq_length": 2048,
    "dtype": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "load_in_16bit": False,
    "full_finetuning": False,
    "token": None,
    "rope_scaling": None,
    "fix_tokenizer": True,
    "trust_remote_code": False,
    "use_gradient_checkpointing": "unsloth",
    "resize_model_vocab": None,
    "revision": None,
    "use_exact_model_name": False,
    "float32_mixed_precision": None,
    "fast_inference": False,
    "gpu_memory_utilization": 0.5,
    "float8_kv_cache": False,
    "random_state": 3407,
    "max_lora_rank": 64,
    "disable_log_stats": True,
    "qat_scheme": None,
    "load_in_fp8": False,
    "text_only": False,
}


def test_from_pretrained_has_the_drop_in_signature() -> None:
    from toolkit.policy.language_model import FastLanguageModel

    parameters = inspect.signature(FastLanguageModel.from_pretrained).parameters
    defaults = {name: value.default for name, value in parameters.items()}
    assert {name: defaults[name] for name in SIGNATURE} == SIGNATURE
    assert {"device_map", "offload_embedding", "kwargs"} <= defaults.keys()


def test_every_parameter_is_in_one_table() -> None:
    """If a parameter were in no table, check_request would refuse it as unknown."""
    from toolkit.policy.language_model import FastLanguageModel

    parameters = set(inspect.signature(FastLanguageModel.from_pretrained).parameters) - {"kwargs"}
    fields = set(load_request.LoadRequest.__dataclass_fields__) - {"engine"}
    special = {"use_exact_model_name", "text_only", "float32_mixed_precision"}
    assert parameters <= fields | set(ENGINE_DEFAULTS) | set(REFUSED_ARGUMENTS) | special


@pytest.mark.parametrize(
    ("arguments", "error_class", "words"),
    [
        (
            {"max_sequence_length": 3},
            ConfigTypeError,
            ["'max_sequence_length'", "'max_seq_length'"],
        ),
        ({"zzz": 3}, ConfigTypeError, ["unknown keyword argument 'zzz'"]),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            ConfigValueError,
            ["4bit", "8bit", "default"],
        ),
        ({"load_in_8bit": True, "load_in_16bit": True}, ConfigValueError, ["8bit", "16bit"]),
        ({"load_in_4bit": 1}, ConfigTypeError, ["load_in_4bit=1"]),
        ({"full_finetuning": True, "load_in_4bit": True}, ConfigValueError, ["full_finetuning"]),
        (
            {"load_in_16bit": True, "dtype": "float32"},
            ConfigValueError,
            ["load_in_16bit", "float32"],
        ),
        ({"dtype": "int8"}, ConfigValueError, ["int8", "bfloat16"]),
        ({"max_seq_length": 0}, ConfigTypeError, ["max_seq_length=0"]),
        ({"max_seq_length": 12.0}, ConfigTypeError, ["max_seq_length=12.0"]),
        ({"resize_model_vocab": "9"}, ConfigTypeError, ["resize_model_vocab='9'"]),
        ({"random_state": None}, ConfigTypeError, ["random_state=None"]),
        ({"use_gradient_checkpointing": "yes"}, ConfigValueError, ["'yes'", '"unsloth"']),
        ({"use_gradient_checkpointing": 1}, ConfigValueError, ["=1"]),
        ({"use_exact_model_name": "x"}, ConfigTypeError, ["use_exact_model_name"]),
        ({"float32_mixed_precision": 3}, ConfigTypeError, ["float32_mixed_precision"]),
        (
            {"float32_mixed_precision": True, "dtype": "bfloat16"},
            ConfigValueError,
            ["float32_mixed_precision"],
        ),
        ({"load_in_fp8": True}, UnsupportedError, ["load_in_fp8"]),
        ({"load_in_fp8": "block"}, UnsupportedError, ["load_in_fp8='block'"]),
        ({"qat_scheme": "int4"}, UnsupportedError, ["qat_scheme='int4'"]),
        ({"offload_embedding": True}, UnsupportedError, ["offload_embedding"]),
        ({"text_only": "yes"}, ConfigTypeError, ["text_only='yes'"]),
        ({"model_name": ""}, ConfigValueError, ["model_name"]),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: dict[str, Any], error_class: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error_class) as caught:
        check_request({**VALID_ARGUMENTS, **arguments})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error_class", "words"),
    [
        ({"trust_remote_code": True}, UnsupportedError, ["trust_remote_code", "fast_inference"]),
        ({"load_in_8bit": True}, UnsupportedError, ["load_in_8bit", "fast_inference"]),
        ({"full_finetuning": True}, UnsupportedError, ["full_finetuning", "fast_inference"]),
        ({"rope_scaling": {"factor": 2.0}}, UnsupportedError, ["rope_scaling"]),
        ({"resize_model_vocab": 90}, UnsupportedError, ["resize_model_vocab"]),
        ({"device_map": {"": 1}}, UnsupportedError, ["device_map", "CUDA_VISIBLE_DEVICES"]),
        (
            {"max_lora_rank": 48},
            ConfigValueError,
            ["max_lora_rank=48", "1, 8, 16, 32, 64", "use max_lora_rank=64"],
        ),
        ({"max_lora_rank": True}, ConfigValueError, ["max_lora_rank=True"]),
        ({"gpu_memory_utilization": 1.5}, ConfigValueError, ["gpu_memory_utilization=1.5"]),
        ({"gpu_memory_utilization": "half"}, ConfigValueError, ["gpu_memory_utilization='half'"]),
        ({"max_num_batched_tokens": -3}, ConfigTypeError, ["max_num_batched_tokens=-3", "above 0"]),
        ({"max_num_seqs": "many"}, ConfigTypeError, ["max_num_seqs='many'", "integer"]),
        ({"max_loras": True}, ConfigTypeError, ["max_loras=True"]),
        ({"dequantized_rollouts": 0}, ConfigTypeError, ["dequantized_rollouts=0", "above 0"]),
        ({"dequantized_rollouts": "no"}, ConfigTypeError, ["dequantized_rollouts='no'"]),
        ({"enforce_eager": "no"}, ConfigTypeError, ["enforce_eager='no'", "True or False"]),
    ],
)
def test_arguments_that_exclude_an_engine_are_refused(
    arguments: dict[str, Any],
    error_class: type[Exception],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_request, "vllm_available", lambda: True)
    with pytest.raises(error_class) as caught:
        check_request({**VALID_ARGUMENTS, "fast_inference": True, **arguments})
    for word in words:
        assert word in str(caught.value)


def test_without_vllm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_request, "vllm_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"grpo-toolkit\[vllm\].*grpo-toolkit\[cpu-engine\]"
    ) as caught:
        check_request({**VALID_ARGUMENTS, "fast_inference": True})
    assert isinstance(caught.value, MissingExtraError)


def test_auto_is_accepted_with_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_request, "vllm_available", lambda: True)
    arguments = {"gpu_memory_utilization": "auto", "max_lora_rank": "auto", "max_num_seqs": 8}
    checked = check_request({**VALID_ARGUMENTS, "fast_inference": True, **arguments})
    assert {name: checked.engine[name] for name in arguments} == arguments


def test_unused_engine_options_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="no effect .*: gpu_memory_utilization, max_num_seqs"):
        check_request({**VALID_ARGUMENTS, "gpu_memory_utilization": 0.6, "max_num_seqs": 4})


def test_default_engine_options_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked = check_request(
            {**VALID_ARGUMENTS, "max_lora_rank": 64, "gpu_memory_utilization": 0.5}
        )
    assert checked.dtype == "auto"
    assert checked.use_safetensors is True


def test_a_torch_dtype_is_accepted() -> None:
    import torch

    assert check_request({**VALID_ARGUMENTS, "dtype": torch.bfloat16}).dtype == "bfloat16"
    assert check_request({**VALID_ARGUMENTS, "float32_mixed_precision": True}).dtype == "float32"


def test_the_repr_does_not_contain_the_token() -> None:
    assert "hf_secret" not in repr(check_request({**VALID_ARGUMENTS, "token": "hf_secret"}))


@pytest.mark.parametrize("name", [None, 3, b"model"])
def test_a_name_must_be_text_or_a_path(name: Any) -> None:
    from toolkit.policy.language_model import FastLanguageModel

    with pytest.raises(ConfigTypeError, match="model_name="):
        FastLanguageModel.from_pretrained(name, load_in_4bit=False)
