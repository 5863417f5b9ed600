"""Rollouts without vLLM: transformers' own generate, with a growing KV cache and full logits of
one position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing import kv_bytes
from toolkit.sizing.model_blocks import DTYPE_BYTES
from toolkit.sizing.terms import Term

if TYPE_CHECKING:
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.workload import Workload

# float32 logits, scores, sorted copies and probabilities of one position in generation/utils.py
# ``_sample``.
LOGIT_BYTES = 24


def transformers_terms(spec: ModelSpec, plan: EnginePlan, work: Workload) -> list[Term]:
    """KV of all rollouts at once (twice while a layer's cache grows by concatenation), and the
    sampling temporaries.
    """
    width = DTYPE_BYTES[plan.dtype]
    sequence = kv_bytes.sequence_bytes(spec, work.sequence, width, block_tokens=1)
    growing = 2 * kv_bytes.bytes_per_token(spec, width) * work.sequence // max(spec.layers, 1)
    return [
        Term(
            "rollout.kv",
            work.rollouts * (sequence + growing),
            f"{work.rollouts} x {work.sequence} tokens in transformers' cache",
            "rollout",
        ),
        Term(
            "rollout.logits",
            work.rollouts * spec.vocab_size * LOGIT_BYTES,
            f"{work.rollouts} rows of {spec.vocab_size} logits",
            "rollout",
        ),
    ]
