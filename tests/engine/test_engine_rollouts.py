"""Rollouts on the real engine: layout, options, reproducibility, and changing adapters."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.generation.vllm_generation import extract_logprobs
from vllm import SamplingParams

from toolkit.base.errors import ConfigError, ConfigValueError, NodeError, UnsupportedError
from toolkit.engine.rollout_engine import RolloutEngine
from toolkit.engine.rollout_request import Sampling, derive_seed
from toolkit.engine.token_generation import build_rollout
from toolkit.engine.vllm_internals import drop_requests
from toolkit.policy.shared_weights import shared_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peft import PeftModel

    from toolkit.engine.engine import Engine

pytestmark = pytest.mark.engine

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12] * 40]
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def policy(llama: Engine) -> Iterator[PeftModel]:
    """The shared model with a non-zero adapter, which is removed after the test."""
    yield from temporary_adapter(llama, target_modules=ALL_PROJECTIONS)


def temporary_adapter(engine: Engine, **settings: object) -> Iterator[PeftModel]:
    torch.manual_seed(0)
    model = shared_model(engine, check=False)
    # type: ignore[arg-type]
    policy = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, **settings))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, 0.1)
    yield policy
    policy.unload()


def test_the_engine_implements_rollout_engine(llama: Engine) -> None:
    assert isinstance(llama, RolloutEngine)


def test_every_sampling_call_wakes_the_kv_cache(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    switch = SimpleNamespace(sleep=lambda: calls.append("sleep"), wake=lambda: calls.append("wake"))
    inner = llama.llm.generate
    monkeypatch.setattr(llama, "_kv_sleep", switch)
    monkeypatch.setattr(
        llama.llm, "generate", lambda *a, **k: calls.append("draw") or inner(*a, **k)
    )
    llama.sleep()
    llama.generate(PROMPTS[:1], Sampling(max_tokens=1), seed=1, adapter=False)
    llama.sleep()
    llama.vllm_generate([{"prompt_token_ids": PROMPTS[0]}], SamplingParams(max_tokens=1))
    assert calls == ["sleep", "wake", "draw"] * 2


def test_the_rollout_has_trls_layout(llama: Engine) -> None:
    rollout = llama.generate(PROMPTS, Sampling(n=3, max_tokens=6, logprobs=0), seed=1)
    assert [len(part or []) for part in rollout.as_tuple()] == [9, 9, 9, 9]
    assert rollout.prompt_ids[:4] == [PROMPTS[0]] * 3 + [PROMPTS[1]]
    assert rollout.logprobs is not None
    assert rollout.logprob_token_ids is not None
    for ids, values, tokens in zip(
        rollout.completion_ids, rollout.logprobs, rollout.logprob_token_ids, strict=True
    ):
        assert tokens == [[token] for token in ids]
        assert all(len(value) == 1 and value[0] < 0 for value in values if value[0] is not None)


@pytest.mark.parametrize("logprobs", [0, 1, 3])
def test_logprobs_equal_those_that_trl_extracts(llama: Engine, logprobs: int) -> None:
    sampling = Sampling(max_tokens=6, logprobs=logprobs, top_p=0.9)
    rollout = llama.generate(PROMPTS, sampling, seed=4, adapter=False)
    from toolkit.engine.rollout_request import request_seed

    params = [
        SamplingParams(max_tokens=6, logprobs=logprobs, top_p=0.9, seed=request_seed(4, index))
        for index in range(len(PROMPTS))
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llama.llm.generate(requests, params, use_tqdm=False)
    values, tokens = extract_logprobs(outputs)
    assert rollout.completion_ids == [list(output.outputs[0].token_ids) for output in outputs]
    assert rollout.logprob_token_ids == tokens
    assert rollout.logprobs == values


def test_no_logprobs_if_none_are_requested(llama: Engine) -> None:
    rollout = llama.generate(PROMPTS, Sampling(max_tokens=2, logprobs=None), seed=1)
    assert (rollout.logprobs, rollout.logprob_token_ids) == (None, None)
    assert llama.generate([], Sampling(), seed=1).completion_ids == []


def test_the_same_seed_gives_the_same_completions(llama: Engine) -> None:
    sampling = Sampling(n=4, max_tokens=12)
    first = llama.generate(PROMPTS, sampling, seed=derive_seed(42, 7))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    other = llama.generate(PROMPTS[:1], sampling, seed=derive_seed(42, 8))
    assert torch.equal(state, torch.get_rng_state())  # the trainer's generator is not touched
    again = llama.generate(PROMPTS, sampling, seed=derive_seed(42, 7))
    assert again == first
    assert other.completion_ids != first.completion_ids[:4]
    assert len({tuple(ids) for ids in first.completion_ids[:4]}) == 4  # n samples, not n copies
    twice = llama.generate([PROMPTS[0], PROMPTS[0]], sampling, seed=3).completion_ids
    assert twice[:4] != twice[4:]  # the same prompt twice gives two samples


def test_a_group_may_be_split_over_requests(llama: Engine) -> None:
    """One request with n completions gives the same completions as n requests of the same rows."""
    full_rollout = llama.generate(PROMPTS, Sampling(n=4, max_tokens=12), seed=derive_seed(42, 7))
    rows = [prompt for prompt in PROMPTS for _ in range(4)]
    partial_rollouts = [
        llama.generate(
            rows[start:end],
            Sampling(max_tokens=12),
            seed=derive_seed(42, 7),
            rows=range(start, end),
        )
        for start, end in ((0, 6), (6, len(rows)))
    ]
    assert (
        partial_rollouts[0].completion_ids + partial_rollouts[1].completion_ids
        == full_rollout.completion_ids
    )


def test_prompts_may_exceed_the_token_limit_of_a_batch(llama: Engine) -> None:
    """vLLM's CPU worker would end if the prompt of a seeded request were prefilled in parts."""
    prompts = [[3 + index] * 60 for index in range(12)]
    assert sum(map(len, prompts)) > (llama.options.max_num_batched_tokens or 0)
    rollout = llama.generate(prompts, Sampling(n=1, max_tokens=4), seed=1)
    assert all(1 <= len(ids) <= 4 for ids in rollout.completion_ids)
    alone = llama.generate(prompts[:1], Sampling(n=1, max_tokens=4), seed=1)
    assert alone.completion_ids[0] == rollout.completion_ids[0]


def test_greedy_is_the_most_likely_token(llama: Engine) -> None:
    model = shared_model(llama, check=False)
    with torch.no_grad():
        best = model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax().item()
    rollout = llama.generate(PROMPTS[:1], Sampling(temperature=0.0, max_tokens=1), seed=1)
    assert rollout.completion_ids == [[best]]


def test_logprobs_are_of_the_processed_distribution(llama: Engine) -> None:
    rollout = llama.generate(
        PROMPTS[:1], Sampling(n=8, max_tokens=8, top_k=1, temperature=2.0), seed=1
    )
    assert rollout.logprobs is not None
    assert {value for one in rollout.logprobs for position in one for value in position} == {0.0}


def test_min_p_and_repetition_penalty_reach_the_engine(llama: Engine) -> None:
    sharp = llama.generate(PROMPTS[:1], Sampling(n=4, max_tokens=6, min_p=1.0), seed=1)
    assert len({tuple(ids) for ids in sharp.completion_ids}) == 1
    plain = Sampling(temperature=0.0, max_tokens=24)
    penalized = Sampling(temperature=0.0, max_tokens=24, repetition_penalty=5.0)
    ids = llama.generate([[12] * 40], penalized, seed=1).completion_ids[0]
    assert len(set(ids)) == len(ids) > 0
    assert ids != llama.generate([[12] * 40], plain, seed=1).completion_ids[0]


def test_generation_kwargs_and_stop_tokens(llama: Engine) -> None:
    sampling = Sampling(max_tokens=20, extra={"min_tokens": 5, "max_tokens": 7})
    assert len(llama.generate(PROMPTS[:1], sampling, seed=1).completion_ids[0]) in (5, 6, 7)
    free = llama.generate(PROMPTS[:1], Sampling(max_tokens=9, temperature=0.0), seed=1)
    stop = free.completion_ids[0][2]
    sampling = Sampling(max_tokens=9, temperature=0.0, stop_token_ids=(stop,))
    stopped = llama.generate(PROMPTS[:1], sampling, seed=1).completion_ids[0]
    assert stopped == free.completion_ids[0][: free.completion_ids[0].index(stop) + 1]
    for token in (stop, str(stop)):
        biased = Sampling(max_tokens=3, temperature=0.0, extra={"logit_bias": {token: 100.0}})
        assert llama.generate(PROMPTS[:1], biased, seed=1).completion_ids == [[stop] * 3]
    text = Sampling(max_tokens=9, temperature=0.0, extra={"stop": [f"t{stop}"]})
    assert len(llama.generate(PROMPTS[:1], text, seed=1).completion_ids[0]) < 9


def test_an_aborted_request_is_an_error() -> None:
    completion = SimpleNamespace(finish_reason="error", token_ids=[], logprobs=None)
    with pytest.raises(ConfigError, match=r"aborted a completion \(error\)") as caught:
        build_rollout([[5]], [SimpleNamespace(outputs=[completion])])
    assert "vllm_structured_outputs_regex" in str(caught.value.fix)


@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")
def test_structured_outputs_regex(llama: Engine) -> None:
    sampling = Sampling(n=2, max_tokens=4, structured_outputs_regex="(t5|t7)+")
    rollout = llama.generate(PROMPTS[:2], sampling, seed=1)
    for ids in rollout.completion_ids:
        text = "".join(f"t{token}" for token in ids if token != 2)
        assert re.fullmatch("(t5|t7)+", text), ids


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(top_p=7.0), "top_p"),
        (Sampling(extra={"no_such_option": 1}), "no_such_option"),
        (Sampling(extra={"logit_bias": {"yes": 1.0}}), "yes"),
    ],
)
def test_options_that_vllm_rejects_are_refused(
    llama: Engine, sampling: Sampling, message: str
) -> None:
    with pytest.raises(ConfigValueError, match=message):
        llama.generate(PROMPTS, sampling, seed=1)
    llama.generate(PROMPTS, Sampling(max_tokens=1), seed=1)  # the engine still works


def test_prompts_that_are_too_long_or_empty_are_refused(llama: Engine) -> None:
    with pytest.raises(ConfigValueError, match="prompt 1 has 128 tokens"):
        llama.generate([[5], [5] * 128], Sampling(), seed=1)
    with pytest.raises(ConfigValueError, match="prompt 0 has no tokens"):
        llama.generate([[]], Sampling(), seed=1)


def test_publish_resets_cached_prefixes(llama: Engine, policy: PeftModel) -> None:
    prompt = [int(token) for token in range(3, 99)]  # several whole cache blocks
    greedy = Sampling(max_tokens=4, temperature=0.0)
    llama.publish(policy)
    llama.generate([prompt], greedy, seed=1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(-1.5)
        llama.publish(policy)
        rollout = llama.generate([prompt], greedy, seed=1)
        ids = rollout.completion_ids[0]
        logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    trainer_logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert rollout.logprobs is not None
    assert torch.allclose(trainer_logprobs, torch.tensor(rollout.logprobs[0])[:, 0], atol=1e-5)


def test_later_publishes_only_write_into_the_slot(
    llama: Engine, policy: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs have captured the slot's addresses; vLLM's manager is not called again."""
    llama.publish(policy)
    adapters = llama._adapters
    assert adapters is not None
    slots_before = adapters._copy_plans["default"].b_to
    with torch.no_grad(), monkeypatch.context() as patch:
        for name in ("add_adapter", "remove_adapter", "activate_adapter"):
            patch.setattr(adapters._manager, name, None)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.25)
        llama.publish(policy)
    plan = adapters._copy_plans["default"]
    assert [p.data_ptr() for p in plan.b_to] == [p.data_ptr() for p in slots_before]
    assert all(bool((place == 0.25).all()) for place in plan.b_to)  # alpha = r
    stacked = [
        part.data_ptr()
        for layer in adapters._manager.modules.values()
        for part in getattr(layer, "lora_b_stacked", ())
    ]
    assert {p.untyped_storage().data_ptr() for p in slots_before} <= set(stacked)


def test_a_saved_adapter_uses_the_slot_temporarily(
    llama: Engine, policy: PeftModel, tmp_path: Path
) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.0)
    llama.publish(policy)
    trained = llama.generate(PROMPTS, sampling, seed=1)
    policy.save_pretrained(tmp_path)
    request = llama.load_lora(str(tmp_path))
    assert llama.load_lora(str(tmp_path)) is request
    params = SamplingParams(max_tokens=6, temperature=0.0)
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llama.llm.generate(inputs, params, lora_request=request, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == trained.completion_ids
    # max_loras is 1: the saved adapter has replaced the policy's, which is published again.
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    base = llama.generate(PROMPTS, sampling, seed=1, adapter=False)
    assert llama.generate(PROMPTS, sampling, seed=1) == base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"r": 32, "target_modules": ALL_PROJECTIONS},
            "rank 32, but the engine supports ranks up to 16",
        ),
        ({"r": 8, "target_modules": ["lm_head"]}, "no LoRA slot for lm_head"),
        ({"r": 8, "target_modules": ["embed_tokens"]}, "embedding"),
        ({"r": 8, "target_modules": ALL_PROJECTIONS, "use_dora": True}, "DoRA"),
        ({"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "whole modules"),
    ],
)
def test_adapters_that_no_slot_supports_are_refused(
    llama: Engine, settings: dict, message: str
) -> None:
    model = shared_model(llama, check=False)
    policy = get_peft_model(model, LoraConfig(**settings), adapter_name="other")
    with pytest.raises((ConfigValueError, UnsupportedError), match=message) as caught:
        llama.publish(policy, "other")
    assert caught.value.fix or caught.value.where
    with pytest.raises(ConfigValueError, match="no adapter named 'nobody'"):
        llama.publish(policy, "nobody")


def test_an_adapter_on_some_layers_leaves_the_others_unchanged(llama: Engine) -> None:
    for policy in temporary_adapter(
        llama, target_modules=["k_proj", "up_proj"], layers_to_transform=[1]
    ):
        llama.publish(policy)
        rollout = llama.generate(PROMPTS[:1], Sampling(max_tokens=6), seed=1)
        ids = rollout.completion_ids[0]
        with torch.no_grad():
            logits = policy(torch.tensor([PROMPTS[0] + ids])).logits[0, len(PROMPTS[0]) - 1 : -1]
        trainer_logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert rollout.logprobs is not None
        assert torch.allclose(trainer_logprobs, torch.tensor(rollout.logprobs[0])[:, 0], atol=1e-5)


@pytest.mark.parametrize("failing_part", ["forward", "logits"])
def test_after_out_of_memory_the_rollout_is_the_same(
    llama: Engine,
    policy: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    failing_part: str,
    caplog: Any,
) -> None:
    """The engine's step raises in the forward pass, or after it when it computes the logits."""
    llama.publish(policy)
    prompts = [*PROMPTS[:2], [12] * 30]  # no full block: a decode step has 1 token per sequence
    sampling = Sampling(n=4, max_tokens=10)
    expected = llama.generate(prompts, sampling, seed=6)
    failed_sizes: list[int] = []
    steps: list[int] = []
    name = {"forward": "forward", "logits": "compute_logits"}[failing_part]
    original = getattr(llama.module, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        steps.append(tokens.shape[0])
        # Fails in a step of more than five sequences, after the first three steps.
        if len(steps) > 3 and 5 < tokens.shape[0] <= 12:
            failed_sizes.append(tokens.shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(llama.module, name, limited)
        repeated = llama.generate(prompts, sampling, seed=6)
        assert len(failed_sizes) >= 1
        assert "out of memory with 12 sequences. From now on at most 6 run at a time" in caplog.text
        failures_before = len(failed_sizes)
        assert repeated.completion_ids == expected.completion_ids
        split_rollout = llama.generate(prompts, sampling, seed=6)  # split from the start
        assert split_rollout.completion_ids == expected.completion_ids
        assert len(failed_sizes) == failures_before
    assert llama.llm.llm_engine.get_num_unfinished_requests() == 0
    assert repeated.logprobs is not None
    assert expected.logprobs is not None
    for actual, expected_logprobs in zip(repeated.logprobs, expected.logprobs, strict=True):
        assert torch.allclose(torch.tensor(actual), torch.tensor(expected_logprobs), atol=1e-5)
    llama._max_completions_per_call = None
    assert llama.generate(prompts, sampling, seed=6) == expected
    assert llama.llm.reset_prefix_cache()


def test_an_interrupted_rollout_leaves_no_requests(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user interrupts a notebook cell with Ctrl-C and runs the cell again."""
    sampling = Sampling(n=4, max_tokens=10)
    expected = llama.generate(PROMPTS, sampling, seed=6, adapter=False)
    forward, steps = llama.module.forward, []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(llama.module, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(PROMPTS, sampling, seed=6, adapter=False)
    assert llama.llm.llm_engine.get_num_unfinished_requests() == 0
    assert llama.generate(PROMPTS, sampling, seed=6, adapter=False) == expected


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("too many values to unpack"),  # not a refusal: vLLM accepted the request
    ],
)
def test_a_failed_engine_refuses_further_calls(
    llama: Engine, policy: PeftModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    forward, steps = llama.module.forward, []

    def raise_error(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise error
        return forward(*args, **kwargs)

    llama.publish(policy)
    with monkeypatch.context() as patch:
        patch.setattr(llama.module, "forward", raise_error)
        with pytest.raises(NodeError, match=str(error)) as caught:
            llama.generate(PROMPTS, Sampling(max_tokens=8), seed=1)
        assert "resumes from the last checkpoint" in str(caught.value.fix)
    params = SamplingParams(max_tokens=2)
    for call in (
        lambda: llama.generate(PROMPTS, Sampling(), seed=1),
        lambda: llama.vllm_generate([{"prompt_token_ids": PROMPTS[0]}], params),
        lambda: llama.publish(policy),
        lambda: llama.lora_request(),
    ):
        with pytest.raises(NodeError, match="failed earlier"):
            call()
    llama._failure = None  # the failure was simulated: later tests use the same engine
    drop_requests(llama.llm)
