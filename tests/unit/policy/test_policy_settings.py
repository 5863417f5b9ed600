"""The checks of the settings of get_peft_model, without a model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from toolkit.base.errors import ConfigTypeError, ConfigValueError, UnsupportedError
from toolkit.config.run_config import LoraSection
from toolkit.policy.lora_settings import (
    LoraSettings,
    check_engine_support,
    check_layer_numbers,
    check_modules_to_save,
    check_settings,
    check_targets,
)

MODULE_NAMES = [
    "",
    "model",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "lm_head",
]


def numpy_four() -> Any:
    import numpy

    return numpy.int64(4)


@pytest.mark.parametrize("r", [True, 4.0, "4", None])
def test_r_must_be_an_integer(r: Any) -> None:
    with pytest.raises(TypeError, match="must be an integer"):
        check_settings(LoraSettings(r=r))


def test_a_numpy_integer_is_refused() -> None:
    with pytest.raises(TypeError, match="must be an integer, not int64"):
        check_settings(LoraSettings(r=numpy_four()))


@pytest.mark.parametrize("r", [0, -3])
def test_r_must_be_positive(r: int) -> None:
    with pytest.raises(ValueError, match="larger than 0"):
        check_settings(LoraSettings(r=r))


@pytest.mark.parametrize(
    ("values", "error_class", "words"),
    [
        ({"lora_alpha": "8"}, ConfigTypeError, "lora_alpha"),
        ({"lora_alpha": 0}, ConfigValueError, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, ConfigValueError, "lora_alpha=nan"),
        ({"lora_dropout": 1.0}, ConfigValueError, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, ConfigValueError, "lora_dropout"),
        ({"random_state": 1.5}, ConfigTypeError, "random_state"),
        ({"bias": "some"}, ConfigValueError, "bias='some'"),
        ({"init_lora_weights": "gauss"}, ConfigValueError, "did you mean 'gaussian'"),
        ({"init_lora_weights": "pissa_niter_x"}, ConfigValueError, "pissa_niter_x"),
        ({"init_lora_weights": "pissa_niter_1000"}, ConfigValueError, "pissa_niter_1000"),
        ({"loftq_config": {"bits": 4}}, ConfigValueError, "loftq_config"),
        (
            {"target_modules": "all-linear", "layers_to_transform": (0,)},
            ConfigValueError,
            "layers_to_transform",
        ),
        ({"layers_pattern": "layers"}, ConfigValueError, "layers_pattern"),
    ],
)
def test_invalid_values_are_refused(
    values: dict[str, Any], error_class: type[Exception], words: str
) -> None:
    with pytest.raises(error_class, match=re.escape(words)):
        check_settings(LoraSettings(**values))


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal", "lora_ga"]
)
def test_pefts_init_methods_are_accepted(init: Any) -> None:
    check_settings(LoraSettings(init_lora_weights=init))


@pytest.mark.parametrize(
    ("r", "maximum", "smallest"), [(33, 32, 64), (2, 1, 8), (65, 64, 128), (257, 256, 320)]
)
def test_a_rank_above_max_lora_rank_is_refused_with_advice(
    r: int, maximum: int, smallest: int
) -> None:
    with pytest.raises(ValueError, match=f"r={r} is above max_lora_rank={maximum}") as caught:
        check_engine_support(LoraSettings(r=r), maximum)
    assert f"max_lora_rank={smallest}" in str(caught.value)


def test_a_rank_above_vllms_largest_is_refused() -> None:
    with pytest.raises(ValueError, match="vLLM does not support ranks above 512"):
        check_engine_support(LoraSettings(r=513), 512)


@pytest.mark.parametrize(
    "values",
    [
        {"modules_to_save": ("lm_head",)},
        {"target_modules": ("q_proj", "embed_tokens")},
        {"target_modules": ("model.lm_head",)},
        {"target_modules": r".*\.(q_proj|lm_head)"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ("experts.up",)},
        *({"init_lora_weights": init} for init in ("pissa", "pissa_niter_4", "olora", "corda")),
        *({"init_lora_weights": init} for init in ("loftq", "eva", "lora_ga")),
    ],
)
def test_settings_that_an_engine_does_not_support_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError) as caught:
        check_engine_support(LoraSettings(**values), 64)
    assert isinstance(caught.value, UnsupportedError)
    name = next(iter(values))
    message = str(caught.value)
    assert name in message or "embed_tokens" in message or "lm_head" in message


def test_layers_and_saved_modules_must_exist_in_the_model() -> None:
    check_layer_numbers(LoraSettings(layers_to_transform=(0, 1)), 2)
    with pytest.raises(ConfigValueError, match="2, 9 must be below 2, the number of layers"):
        check_layer_numbers(LoraSettings(layers_to_transform=(0, 2, 9)), 2)
    check_modules_to_save(LoraSettings(modules_to_save=("q_proj",)), MODULE_NAMES)
    with pytest.raises(ConfigValueError, match=r"no module 'q_prj' .did you mean 'q_proj'"):
        check_modules_to_save(LoraSettings(modules_to_save=("q_prj",)), MODULE_NAMES)


def test_ranks_in_rank_pattern_are_checked_too() -> None:
    settings = LoraSettings(r=8, rank_pattern={"q_proj": 24}, alpha_pattern={"q_proj": 2})
    check_engine_support(settings, 32)
    with pytest.raises(ConfigValueError, match="rank 24 in rank_pattern is above max_lora_rank=16"):
        check_engine_support(settings, 16)


def test_dropout_with_an_engine_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match="without dropout"):
        check_engine_support(LoraSettings(lora_dropout=0.1), 64)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_init_methods_that_keep_the_base_weights_are_accepted(init: Any) -> None:
    check_engine_support(LoraSettings(r=8, init_lora_weights=init), 8)


def test_existing_targets_are_accepted() -> None:
    check_targets(LoraSettings(target_modules=("q_proj", "mlp.up_proj")), MODULE_NAMES)
    check_targets(LoraSettings(target_modules="all-linear"), MODULE_NAMES)
    check_targets(LoraSettings(target_modules=r".*q_proj"), MODULE_NAMES)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_proj", "qproj"), "no module 'qproj' (did you mean 'q_proj'?)"),
        (("proj",), "no module 'proj'"),
        ((), "target_modules is empty"),
        (r".*qq", "matches no module"),
        ("(", "not a valid pattern"),
    ],
)
def test_a_missing_target_is_refused(targets: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_targets(LoraSettings(target_modules=targets), MODULE_NAMES)


def test_scaling_with_and_without_rslora() -> None:
    assert LoraSettings(r=16, lora_alpha=32).scaling == 2.0
    assert LoraSettings(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


def test_settings_from_a_run_files_section() -> None:
    section = LoraSection(r=8, lora_alpha=4, use_rslora=True, target_modules=("q_proj",))
    assert LoraSettings.from_section(section) == LoraSettings(
        r=8, lora_alpha=4, use_rslora=True, target_modules=("q_proj",)
    )
