"""FastLanguageModel with ``fast_inference=True`` on the real engine, compared with the model
without an engine.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.base.errors import ConfigError, ConfigTypeError, ConfigValueError, UnsupportedError
from toolkit.policy.language_model import FastLanguageModel
from toolkit.policy.load_request import check_request
from toolkit.policy.model_loading import load_model_and_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine

GREEDY = {"max_tokens": 8, "temperature": 0, "logprobs": 0}
PROMPTS = [[4, 5, 6, 7], [9, 8]]


def _load(folder: Path | str, **values: Any) -> Any:
    defaults = {"max_seq_length": 128, "load_in_4bit": False}
    return FastLanguageModel.from_pretrained(str(folder), **{**defaults, **values})


def test_an_adapter_folder_loads_on_an_engine_without_shared_weights(
    llama_folder: Path, tmp_path: Path
) -> None:
    """``share_weights=False`` gives the trainer its own copy of the weights, and
    ``max_lora_rank="auto"`` becomes large enough for the loaded adapter.

    This test runs before the fixture ``engine_model``, because a process has one engine at a time.
    """
    model, _ = _load(llama_folder)
    trained = FastLanguageModel.get_peft_model(model, r=10, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    folder = trained.save_lora(tmp_path / "a")
    engine_model, _ = _load(
        folder,
        fast_inference=True,
        max_lora_rank="auto",
        gpu_memory_utilization="auto",
        share_weights=False,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_bytes=1 << 26,
    )
    with engine_model.toolkit_engine as engine:
        assert engine.options.max_lora_rank == 16
        assert _token_ids(engine_model.fast_generate(PROMPTS, **GREEDY)) == _token_ids(
            trained.fast_generate(PROMPTS, **GREEDY)
        )
        base = _token_ids(model.fast_generate(PROMPTS, lora_request=None, **GREEDY))
        assert _token_ids(engine_model.fast_generate(PROMPTS, lora_request=None, **GREEDY)) == base
        model_storages = {value.untyped_storage().data_ptr() for value in engine_model.parameters()}
        engine_storages = {
            value.untyped_storage().data_ptr() for value in engine.module.parameters()
        }
        assert not model_storages & engine_storages


@pytest.fixture(scope="module")
def engine_model(llama_folder: Path) -> Iterator[Any]:
    """The PEFT model with an engine; the LoRA B tensors are not zero."""
    model, _ = _load(
        llama_folder,
        fast_inference=True,
        max_lora_rank=8,
        gpu_memory_utilization=0.5,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        kv_cache_bytes=1 << 26,
    )
    with model.toolkit_engine:
        _check_refused_settings(model)
        model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        yield model


def _check_refused_settings(model: Any) -> None:
    """get_peft_model refuses these settings. A refusal leaves no LoRA parameter in the model."""
    with pytest.raises(ConfigValueError, match="r=9 is above max_lora_rank=8") as caught:
        FastLanguageModel.get_peft_model(model, r=9)
    assert "max_lora_rank=16" in str(caught.value)
    for refused in (
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"bias": "all"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ):
        with pytest.raises(UnsupportedError):
            FastLanguageModel.get_peft_model(model, r=8, **refused)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def _token_ids(results: Any) -> list[list[int]]:
    return [list(output.token_ids) for result in results for output in result.outputs]


def test_the_model_is_a_peft_model_with_an_engine(engine_model: Any) -> None:
    import peft
    from vllm import LLM

    assert type(engine_model) is peft.PeftModelForCausalLM
    assert isinstance(engine_model.vllm_engine, LLM)
    assert engine_model.toolkit_engine.options.max_lora_rank == 8
    assert engine_model.max_seq_length == 128


def test_vllm_has_all_engine_arguments_that_are_passed_on() -> None:
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    from toolkit.config.engine_settings import API_OPTIONS, OPTIONS

    known = {item.name for item in fields(EngineArgs)}
    assert {API_OPTIONS[name].vllm_argument for name in set(API_OPTIONS) - set(OPTIONS)} <= known


def test_vllm_and_transformers_sample_the_same_tokens(engine_model: Any, tmp_path: Path) -> None:
    plain, _ = _load(engine_model.save_lora(tmp_path / "a"))
    ours, theirs = (
        engine_model.fast_generate(PROMPTS, **GREEDY),
        plain.fast_generate(PROMPTS, **GREEDY),
    )
    assert _token_ids(ours) == _token_ids(theirs)
    assert [answer.outputs[0].text for answer in ours] == [
        answer.outputs[0].text for answer in theirs
    ]
    for one, two in zip(ours, theirs, strict=True):
        found = torch.tensor(one.outputs[0].logprobs)
        assert torch.allclose(found, torch.tensor(two.outputs[0].logprobs), atol=1e-5)
    base = engine_model.fast_generate(PROMPTS, lora_request=None, **GREEDY)
    assert _token_ids(base) != _token_ids(ours)
    with engine_model.disable_adapter():
        assert _token_ids(engine_model.fast_generate(PROMPTS, **GREEDY)) == _token_ids(base)
    assert _token_ids(base) == _token_ids(plain.fast_generate(PROMPTS, lora_request=None, **GREEDY))


def test_the_engine_samples_from_the_trained_adapter(engine_model: Any, tmp_path: Path) -> None:
    """A changed adapter is used by the next call, without a call to publish it. A saved adapter can
    be requested as well.
    """
    request = engine_model.load_lora(engine_model.save_lora(tmp_path / "a"))
    before = _token_ids(engine_model.fast_generate(PROMPTS, **GREEDY))
    parts = [value for name, value in engine_model.named_parameters() if "lora_B" in name]
    kept = [part.detach().clone() for part in parts]
    try:
        with torch.no_grad():
            for part in parts:
                part.neg_()
        changed = _token_ids(engine_model.fast_generate(PROMPTS, **GREEDY))
        assert changed != before
        assert (
            _token_ids(engine_model.fast_generate(PROMPTS, lora_request=request, **GREEDY))
            == before
        )
        assert _token_ids(engine_model.fast_generate(PROMPTS, **GREEDY)) == changed
        assert list(engine_model.peft_config) == ["default"]
    finally:
        with torch.no_grad():
            for part, value in zip(parts, kept, strict=True):
                part.copy_(value)


def test_vllms_sampling_params_are_accepted(engine_model: Any, tmp_path: Path) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0)
    prompts = [PROMPTS[0], {"prompt_token_ids": PROMPTS[1]}]
    request = engine_model.load_lora(engine_model.save_lora(tmp_path / "a"))
    ours = _token_ids(engine_model.fast_generate(PROMPTS, **GREEDY))
    assert _token_ids(engine_model.fast_generate(prompts, sampling_params=params)) == ours
    assert (
        _token_ids(
            engine_model.fast_generate(prompts, params, lora_request=request, use_tqdm=False)
        )
        == ours
    )
    base = engine_model.fast_generate(prompts, params, lora_request=None)
    assert _token_ids(base) == _token_ids(
        engine_model.fast_generate(PROMPTS, lora_request=None, **GREEDY)
    )


def test_an_interrupted_call_leaves_no_requests(
    engine_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user interrupts a notebook cell with Ctrl-C and runs the cell again."""
    from vllm import SamplingParams

    params = SamplingParams(n=2, max_tokens=8, seed=4)
    whole = _token_ids(engine_model.fast_generate(PROMPTS, params))
    module, steps = engine_model.toolkit_engine.module, []
    inner = module.forward

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine_model.fast_generate(PROMPTS, params)
    assert engine_model.vllm_engine.llm_engine.get_num_unfinished_requests() == 0
    assert _token_ids(engine_model.fast_generate(PROMPTS, params)) == whole


def test_keywords_with_vllms_sampling_params_are_refused(engine_model: Any) -> None:
    from vllm import SamplingParams

    for keywords, words in (
        ({"max_tokens": 3}, "cannot be used together with vLLM's SamplingParams"),
        ({"do_sample": True}, "Hugging Face's generate"),
        ({"bogus": True}, "unknown argument 'bogus'"),
    ):
        with pytest.raises(ConfigTypeError, match=words):
            engine_model.fast_generate(PROMPTS, SamplingParams(), **keywords)
    with pytest.raises(ConfigValueError, match=r"vLLM rejects the request: .* 128"):
        engine_model.fast_generate([[5] * 200], SamplingParams())


def test_arguments_of_transformers_are_refused_with_an_engine(engine_model: Any) -> None:
    for name in ("max_new_tokens", "do_sample", "input_ids", "num_beams"):
        with pytest.raises(ConfigTypeError, match=f"'{name}' is an argument of Hugging Face"):
            engine_model.fast_generate(PROMPTS, **{name: 1})


def test_a_rank_above_the_engines_is_refused_from_a_file(
    engine_model: Any, llama_folder: Path, tmp_path: Path
) -> None:
    model, _ = _load(llama_folder)
    large = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=False)
    folder = large.save_lora(tmp_path / "large")
    with pytest.raises(ConfigValueError, match="r=16 is above max_lora_rank=8"):
        engine_model.load_lora(folder)


def test_a_length_above_the_models_is_refused_before_the_engine_starts(llama_folder: Path) -> None:
    request = check_request(
        {
            "model_name": str(llama_folder),
            "load_in_4bit": False,
            "fast_inference": True,
            "max_seq_length": 4096,
        }
    )
    with pytest.raises(ConfigValueError, match="max_seq_length=4096 is beyond the 256 positions"):
        load_model_and_tokenizer(request)


def test_closing_frees_everything_except_the_weights(engine_model: Any) -> None:
    """The model still works without its engine. This test is the last one of the module, because it
    closes the engine.
    """
    engine = engine_model.toolkit_engine
    held = [weakref.ref(thing) for thing in (engine.llm, engine.module, engine._adapters._manager)]
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = engine_model(ids).logits
        engine.close()
        assert [thing() for thing in held] == [None] * 3
        assert torch.equal(engine_model(ids).logits, before)
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine_model.fast_generate(PROMPTS, max_tokens=1)
