"""fast_generate on the Hugging Face engine: prompts, options, LoRA requests, and refused
arguments.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.base.errors import ConfigTypeError, ConfigValueError
from toolkit.engine.rollout_request import Sampling
from toolkit.policy.generation_prompts import read_sampling

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = {"max_tokens": 8, "temperature": 0}


def _token_ids(outputs: Any) -> list[list[int]]:
    return [output.token_ids for answer in outputs for output in answer.outputs]


def test_all_forms_of_a_prompt_give_the_same_completion(adapted: Any) -> None:
    model = adapted()
    text, ids = "12+3=", model.toolkit_tokenizer("12+3=").input_ids
    prompt_forms = [text, [text], ids, [ids], {"prompt": text}, [{"prompt_token_ids": ids}]]
    results = [model.fast_generate(prompt, **GREEDY) for prompt in prompt_forms]
    assert len({tuple(map(tuple, _token_ids(answers))) for answers in results}) == 1
    assert all(len(answers) == 1 for answers in results)
    assert results[0][0].prompt == text
    assert results[2][0].prompt is None
    assert results[2][0].prompt_token_ids == ids
    output = results[0][0].outputs[0]
    assert output.text == model.toolkit_tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_a_batch_gives_the_completions_of_single_prompts(adapted: Any) -> None:
    model = adapted()
    prompts = ["1", "12+34=5", "abc def"]
    batch = _token_ids(model.fast_generate(prompts, **GREEDY))
    assert batch == [_token_ids(model.fast_generate(prompt, **GREEDY))[0] for prompt in prompts]


def test_greedy_sampling_equals_that_of_transformers(adapted: Any) -> None:
    model = adapted()
    ids = torch.tensor([model.toolkit_tokenizer("12+3=").input_ids])
    plain = model.fast_generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert isinstance(plain, torch.Tensor)
    assert (
        plain[0, ids.shape[1] :].tolist() == _token_ids(model.fast_generate("12+3=", **GREEDY))[0]
    )
    assert model.training


def test_a_seed_determines_the_completions_and_keeps_the_global_state(adapted: Any) -> None:
    model = adapted()
    options = {"max_tokens": 12, "temperature": 1.0, "n": 3}
    state = torch.get_rng_state()
    first = _token_ids(model.fast_generate(["1", "2+"], seed=1, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == _token_ids(model.fast_generate(["1", "2+"], seed=1, **options))
    assert first != _token_ids(model.fast_generate(["1", "2+"], seed=2, **options))
    assert len(first) == 6
    torch.manual_seed(0)
    unseeded = _token_ids(model.fast_generate("1", **options))
    torch.manual_seed(0)
    assert unseeded == _token_ids(model.fast_generate("1", **options))


def test_options_are_accepted_in_every_form(adapted: Any) -> None:
    model = adapted()
    results = [
        model.fast_generate("1", **GREEDY),
        model.fast_generate("1", GREEDY),
        model.fast_generate("1", sampling_params=Sampling(max_tokens=8, temperature=0)),
        model.fast_generate("1", {"temperature": 0}, max_tokens=8),
    ]
    assert len({tuple(_token_ids(answers)[0]) for answers in results}) == 1


def test_logprobs_equal_those_of_the_model(adapted: Any) -> None:
    model = adapted()
    answer = model.fast_generate("12+", max_tokens=6, temperature=0.7, logprobs=0, seed=3)[0]
    output = answer.outputs[0]
    sequence = torch.tensor([answer.prompt_token_ids + output.token_ids])
    with torch.no_grad():
        logits = model(sequence).logits[0, len(answer.prompt_token_ids) - 1 : -1]
    expected = torch.log_softmax(logits / 0.7, -1).gather(
        1, torch.tensor(output.token_ids)[:, None]
    )
    logprobs = torch.tensor([row[0] for row in output.logprobs])
    assert torch.allclose(logprobs, expected[:, 0], atol=1e-5)


def test_generation_stops_at_stop_tokens_and_stop_texts(adapted: Any) -> None:
    model = adapted()
    unlimited = model.fast_generate("12+3=", **GREEDY)[0].outputs[0]
    assert unlimited.finish_reason == "length"
    token = unlimited.token_ids[2]
    first = unlimited.token_ids.index(token)
    stopped_at_token = model.fast_generate("12+3=", stop_token_ids=[token], **GREEDY)[0].outputs[0]
    assert stopped_at_token.token_ids == unlimited.token_ids[: first + 1]
    assert stopped_at_token.finish_reason == "stop"
    word = unlimited.text[1:3]
    stopped_at_text = model.fast_generate("12+3=", stop=[word], **GREEDY)[0].outputs[0]
    assert stopped_at_text.text == unlimited.text.partition(word)[0]
    assert stopped_at_text.finish_reason == "stop"


def test_lora_request_selects_current_adapter_base_or_saved_adapter(
    adapted: Any, load: Any, tmp_path: Path
) -> None:
    model = adapted()
    folder = model.save_lora(tmp_path / "a")
    trained = _token_ids(model.fast_generate("12+3=", **GREEDY))
    base = _token_ids(load()[0].fast_generate("12+3=", **GREEDY))
    assert trained != base
    assert _token_ids(model.fast_generate("12+3=", lora_request=None, **GREEDY)) == base
    with model.disable_adapter():
        assert _token_ids(model.fast_generate("12+3=", **GREEDY)) == base
    request = model.load_lora(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert _token_ids(model.fast_generate("12+3=", **GREEDY)) == base
    assert _token_ids(model.fast_generate("12+3=", lora_request=request, **GREEDY)) == trained


def test_the_wrapped_model_samples_like_the_peft_model(load: Any, tmp_path: Path) -> None:
    from toolkit.policy.language_model import FastLanguageModel

    wrapped_model, _ = load()
    base = _token_ids(wrapped_model.fast_generate("12+3=", **GREEDY))
    peft_model = FastLanguageModel.get_peft_model(
        wrapped_model, r=4, use_gradient_checkpointing=False
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    trained = _token_ids(peft_model.fast_generate("12+3=", **GREEDY))
    assert trained != base
    assert _token_ids(wrapped_model.fast_generate("12+3=", **GREEDY)) == trained
    assert _token_ids(wrapped_model.fast_generate("12+3=", lora_request=None, **GREEDY)) == base
    assert wrapped_model.save_lora(tmp_path / "a") == tmp_path / "a"


def test_a_request_restores_the_model(adapted: Any, load: Any, tmp_path: Path, ids: Any) -> None:
    folder = adapted().save_lora(tmp_path / "a")
    for model in (adapted(), load()[0]):
        flags = {name: value.requires_grad for name, value in model.named_parameters()}
        before, training = model(ids).logits, model.training
        model.fast_generate("1", lora_request=model.load_lora(folder), **GREEDY)
        assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
        assert torch.equal(model(ids).logits, before)
        assert model.training is training


def test_a_request_works_after_its_folder_was_deleted(adapted: Any, tmp_path: Path) -> None:
    import shutil

    model = adapted()
    folder = model.save_lora(tmp_path / "a")
    request = model.load_lora(folder)
    shutil.rmtree(folder)
    expected = _token_ids(model.fast_generate("1", **GREEDY))
    assert _token_ids(model.fast_generate("1", lora_request=request, **GREEDY)) == expected


def test_an_error_in_a_request_restores_the_model(adapted: Any, tmp_path: Path) -> None:
    model = adapted()
    request = model.load_lora(model.save_lora(tmp_path / "a"))
    with pytest.raises(ConfigTypeError):
        model.fast_generate("1", lora_request=request, bogus=1)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tokenz": 3}, "unknown argument 'max_tokenz' (did you mean 'max_tokens'?)"),
        (
            {"use_tqdm": False},
            "'use_tqdm' is an argument of the vLLM engine, but the model has no such engine",
        ),
        ({"max_new_tokens": 3}, "can only be used with input_ids"),
        ({"sampling_params": 3}, "sampling_params has the unsupported type int"),
        (
            {"sampling_params": {"n": 2}, "n": 3},
            "n is in sampling_params and is also passed by name",
        ),
        ({"lora_request": "folder"}, "lora_request has the unsupported type str"),
        ({"prompts": 3}, "prompt 0 must be text or token ids, not int"),
        ({"prompts": ["1", 2.5]}, "prompt 1 must be text or token ids, not float"),
        ({"prompts": [{"role": "user"}]}, "apply the tokenizer's chat template"),
        (
            {"prompts": None, "input_ids": None, "sampling_params": {}},
            "input_ids cannot be used with",
        ),
        ({"structured_outputs": {}}, "unknown argument 'structured_outputs'"),
    ],
)
def test_unsupported_arguments_are_refused(
    adapted: Any, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigTypeError, ConfigValueError)) as caught:
        adapted().fast_generate(**{"prompts": "1", **arguments})
    assert words in str(caught.value)


def test_with_an_engine_transformers_arguments_are_refused() -> None:
    with pytest.raises(ConfigTypeError, match="the model has a vLLM engine") as caught:
        read_sampling(None, {"max_new_tokens": 3}, engine=True)
    assert "fix: use max_tokens" in str(caught.value)


def test_without_an_engine_vllms_sampling_params_are_refused() -> None:
    kind = type("SamplingParams", (SimpleNamespace,), {"__module__": "vllm.sampling_params"})
    with pytest.raises(
        ConfigTypeError, match="vLLM's SamplingParams, but the model has no vLLM engine"
    ):
        read_sampling(kind(), {}, engine=False)


def test_prompts_that_are_too_long_or_empty_are_refused(adapted: Any) -> None:
    with pytest.raises(ConfigValueError, match="prompt 0 has 128 tokens"):
        adapted().fast_generate("1" * 128, **GREEDY)
    with pytest.raises(ConfigValueError, match="prompt 1 has no tokens"):
        adapted().fast_generate(["1", ""], **GREEDY)
    assert adapted().fast_generate([], **GREEDY) == []
