"""Properties of a sizing that hold for every model, card and workload."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolkit.sizing import solve
from toolkit.sizing.terms import total_bytes

CARDS = ("h200", "h100", "a100-40", "l4", "4090", "t4", "b200", "h100:1g.10gb")
NAMES = (
    "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B", "google/gemma-3-27b-it",
    "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V2-Lite-Chat", "microsoft/phi-4",
    "Qwen/Qwen3-Next-80B-A3B-Thinking", "unsloth/llama-3-8b-Instruct-bnb-4bit",
    "HuggingFaceTB/SmolLM2-135M",
)  # fmt: skip
WORK = st.fixed_dictionaries(
    {
        "per_device_train_batch_size": st.sampled_from([1, 2, 8, 32]),
        "gradient_accumulation_steps": st.sampled_from([1, 4]),
        "max_completion_length": st.sampled_from([64, 1024, 4096]),
        "max_prompt_length": st.sampled_from([64, 1024]),
    }
)
MODEL = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 16, 64, 512]),
        "load_in_4bit": st.booleans(),
        "share_weights": st.booleans(),
        "enforce_eager": st.booleans(),
        "float8_kv_cache": st.booleans(),
        "enable_sleep_mode": st.sampled_from([True, False, "auto"]),
        "checkpointing": st.sampled_from([True, False, "auto", "unsloth"]),
        "engine": st.sampled_from(["vllm", "transformers"]),
    }
)


@pytest.fixture(scope="module")
def make_run(spec_of, card, run):
    return lambda name, on, work, values: (
        run(
            work,
            max_seq_length=work["max_prompt_length"] + work["max_completion_length"],
            **values,
        ),
        spec_of(name),
        card(on),
    )


@settings(max_examples=250, deadline=None)
@given(name=st.sampled_from(NAMES), on=st.sampled_from(CARDS), work=WORK, values=MODEL)
@example(  # no multiple of 0.001 lies between the ends of the interval
    name="deepseek-ai/DeepSeek-V2-Lite-Chat",
    on="h100",
    work={
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 1024,
        "max_prompt_length": 1024,
    },
    values={
        "r": 64,
        "load_in_4bit": False,
        "share_weights": False,
        "enforce_eager": False,
        "float8_kv_cache": True,
        "enable_sleep_mode": False,
        "checkpointing": False,
        "engine": "vllm",
    },
)
def test_a_feasible_choice_fits_and_an_infeasible_run_has_remedies(
    make_run, name, on, work, values
):
    config, spec, device = make_run(name, on, work, values)
    result = solve(config, spec, device)
    assert all(isinstance(line.nbytes, int) and line.nbytes >= 0 for line in result.terms)
    json.dumps(result.to_json())
    if not result.feasible:
        assert result.short_bytes > 0
        assert result.infeasible_error().exit_code == 1
        assert all(remedy.frees_bytes > 0 for remedy in result.remedies)
        return
    free = device.free_bytes
    always = total_bytes(result.terms, "always")
    assert always + total_bytes(result.terms, "rollout") <= free
    asleep = result.engine.kv_bytes if result.choice.enable_sleep_mode else 0
    assert always + total_bytes(result.terms, "training") - asleep <= free
    filled = result.apply(config)
    assert filled.model.max_lora_rank >= config.lora.r
    if values["engine"] == "vllm":
        assert result.interval.min <= filled.model.gpu_memory_utilization <= result.interval.max
        assert result.engine.kv_bytes >= result.engine.kv_sequence_bytes * 0.99


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    length=st.integers(64, 4096),
    micro=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from([True, False]),
)
def test_a_longer_sequence_or_larger_micro_batch_never_needs_less(
    make_run, name, length, micro, mode
):
    values = {"r": 16, "checkpointing": mode}
    steps = []
    for batch, tokens in ((micro, length), (2 * micro, length), (micro, length + 64)):
        work = {
            "per_device_train_batch_size": batch,
            "max_completion_length": tokens,
            "max_prompt_length": 64,
        }
        config, spec, device = make_run(name, "b200", work, values)
        steps.append(solve(config, spec, device).trainer.step_bytes)
    assert steps[0] <= steps[1]
    assert steps[0] <= steps[2]
