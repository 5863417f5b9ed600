"""The behaviour of transformers 5.17 and TRL 1.16 in loading, gradient checkpointing and generation
that toolkit.policy depends on.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
    from tiny_llama import make_tiny

    return make_tiny(tmp_path_factory.mktemp("contract") / "tiny")


@pytest.fixture
def model(checkpoint_folder: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(checkpoint_folder)


def test_enabling_checkpointing_has_the_parameter_offload() -> None:
    parameters = inspect.signature(PreTrainedModel.gradient_checkpointing_enable).parameters
    assert list(parameters) == [
        "self",
        "gradient_checkpointing_kwargs",
        "every_n_layers",
        "offload",
    ]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pins where there is an accelerator")
def test_offloading_on_a_cpu_raises(model: Any) -> None:
    model.gradient_checkpointing_enable(offload=True)
    model.train()
    with pytest.raises(RuntimeError, match="pin"):
        model(torch.tensor([[4, 5]]), use_cache=False).logits.sum().backward()


def test_enabling_twice_adds_a_second_hook_unless_the_first_is_removed(model: Any) -> None:
    embeddings = model.get_input_embeddings()
    for _ in range(3):
        model.gradient_checkpointing_enable()
    assert len(embeddings._forward_hooks) == 3
    model.disable_input_require_grads()
    assert len(embeddings._forward_hooks) == 2
    from toolkit.policy.gradient_checkpointing import apply_checkpointing

    second_model = type(model)(model.config)
    apply_checkpointing(second_model, True, max_seq_length=8)
    for _ in range(3):
        second_model.gradient_checkpointing_enable()
    assert len(second_model.get_input_embeddings()._forward_hooks) == 1


def test_trl_enables_checkpointing_again_only_with_its_own_kwargs(model: Any) -> None:
    """TRL's disable_gradient_checkpointing has no offload, so _override_enable is needed."""
    from trl.models.utils import disable_gradient_checkpointing

    calls: list[tuple[Any, ...]] = []
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable = lambda *args, **kwargs: calls.append((args, kwargs))
    with disable_gradient_checkpointing(model, {"use_reentrant": False}):
        assert not model.is_gradient_checkpointing
    assert calls == [(({"use_reentrant": False},), {})]


def test_checkpointing_is_off_in_evaluation_mode(model: Any) -> None:
    """TransformersEngine only switches to evaluation mode, and then needs the cache."""
    model.gradient_checkpointing_enable()
    model.eval()
    assert model(torch.tensor([[4, 5]]), use_cache=True).past_key_values is not None
    model.train()
    assert len(model(torch.tensor([[4, 5]]), use_cache=True).past_key_values or ()) == 0


def test_loading_info_lists_missing_and_unexpected_keys(checkpoint_folder: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(checkpoint_folder, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_positions_are_in_rope_parameters(model: Any) -> None:
    config = model.config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert callable(config.standardize_rope_params)
    assert callable(config.validate_rope)
    assert {"linear", "dynamic", "yarn", "llama3"} <= set(
        transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    )
    assert config.get_text_config() is config


def test_unset_generation_settings_are_those_of_the_checkpoint(model: Any) -> None:
    """So TransformersEngine sets every generation setting that it needs."""
    model.generation_config = GenerationConfig(top_k=7, repetition_penalty=1.5)
    filled, _ = model._prepare_generation_config(GenerationConfig(max_new_tokens=2))
    assert (filled.top_k, filled.repetition_penalty) == (7, 1.5)
    explicit, _ = model._prepare_generation_config(
        GenerationConfig(top_k=0, repetition_penalty=1.0)
    )
    assert (explicit.top_k, explicit.repetition_penalty) == (0, 1.0)


def test_scores_are_the_processed_logits(model: Any) -> None:
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        max_new_tokens=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = torch.tensor([[4, 5]])
    output = model.generate(input_ids=ids, generation_config=config)
    expected = model(ids).logits[:, -1] / 0.5
    finite = output.scores[0].isfinite()
    assert int(finite.sum()) == 3
    assert torch.allclose(output.scores[0][finite], expected[finite], atol=1e-5)
