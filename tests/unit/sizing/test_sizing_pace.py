"""The sizer orders settings by their estimated time per step. The order must be that of the times
measured on one H100.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from toolkit.sizing.solve import best_candidate
from toolkit.sizing.step_time import active_parameters, training_seconds

if TYPE_CHECKING:
    from toolkit.sizing.fit import Candidate

EIGHT_B = "meta-llama/Llama-3.1-8B"
# Steps of 64 sequences of 320 tokens, r = 64: (micro-batch, checkpointing, measured seconds).
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
    # The measurement had these settings.
    values = {"padding_free": False, "fused_kernels": False, **values}
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
    """The model card of Qwen3-30B-A3B states 30.5e9 parameters, of which 3.3e9 are active."""
    spec = spec_of("Qwen/Qwen3-30B-A3B")
    assert 2.9e9 < active_parameters(spec) < 3.5e9
    assert spec.parameters > 30e9
