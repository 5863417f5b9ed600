"""The order of the ways of doing a step, held to what one H100 took for each."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from toolkit.sizing.solve import best_candidate
from toolkit.sizing.step_time import active_parameters, training_seconds

if TYPE_CHECKING:
    from toolkit.sizing.fit import Candidate

EIGHT_B = "meta-llama/Llama-3.1-8B"
# 64 sequences of 320 tokens a step, r = 64: (micro-batch, checkpointing, seconds measured).
MEASURED = [
    (16, False, 1.82),
    (64, True, 2.29),
    (32, True, 2.31),
    (8, False, 2.46),
]


def _candidate_for(run, spec, device, micro, checkpointing, **values) -> Candidate:
    grpo = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 64 // micro,
        "max_prompt_length": 64,
        "max_completion_length": 256,
    }
    values = {"padding_free": False, "fused_kernels": False, **values}  # as it was measured
    config = run(grpo, r=64, checkpointing=checkpointing, max_seq_length=320, **values)
    return best_candidate(config, spec, device, 1)[0]


def test_the_estimated_order_equals_the_measured_order(spec_of, card, run):
    cases = [_candidate_for(run, spec_of(EIGHT_B), card("h200"), *way[:2]) for way in MEASURED]
    estimated = [training_seconds(case) for case in cases]
    assert all(one <= two for one, two in pairwise(estimated))
    for seconds, (*_, measured) in zip(estimated, MEASURED, strict=True):
        assert abs(seconds / measured - 1) < 0.2


def test_sleep_mode_adds_time(spec_of, card, run):
    awake, asleep = (
        _candidate_for(run, spec_of(EIGHT_B), card("h200"), 16, True, enable_sleep_mode=mode)
        for mode in (False, True)
    )
    assert training_seconds(awake) < training_seconds(asleep)


def test_a_mixture_computes_with_its_active_experts(spec_of):
    """Qwen3-30B-A3B: 30.5e9 parameters, 3.3e9 of them active, by its model card."""
    spec = spec_of("Qwen/Qwen3-30B-A3B")
    assert 2.9e9 < active_parameters(spec) < 3.5e9
    assert spec.parameters > 30e9
