"""Rules on the size of the KV cache for the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import format_bytes
from toolkit.config.model_facts import (
    CPU_BLOCK_TOKENS,
    ELEMENT_BYTES,
    GPU_BLOCK_TOKENS,
    min_cache_bytes,
)
from toolkit.config.resolved import resolve_dtype
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_CACHE = "model.kv_cache_bytes"
_LENGTH = "model.max_seq_length"


@rule(
    "LOAD047",
    f"{_CACHE} {_LENGTH} model.model_name",
    example="model:\n  max_seq_length: 4096\n  kv_cache_bytes: 65536\nruntime: {engine: vllm}",
    fix="kv_cache_bytes: auto",
)
def cache_holds_a_sequence(run: Run) -> Iterator[RuleViolation]:
    """kv_cache_bytes is large enough for one sequence of max_seq_length tokens.

    With a smaller cache vLLM does not start. The number of bytes for one sequence is layers x 2 x
    KV heads x head size x bytes per value x tokens. The tokens are rounded up to a whole number of
    cache blocks. vLLM needs one more block, which stays empty. `envcheck size` shows the exact
    number. The rule is checked if the model is on this machine.
    """
    cache_bytes, sequence_tokens = run.value(_CACHE), run.value(_LENGTH)
    if type(cache_bytes) is not int or type(sequence_tokens) is not int:
        return
    if run.model is None or run.engine != "vllm":
        return
    precision_flags = {flag: run.get(f"grpo.{flag}") for flag in ("bf16", "fp16")}
    dtype = resolve_dtype(run.get("model.dtype"), run.situation, grpo=precision_flags)
    device = run.situation.device
    on_cpu = device is not None and device.compute_capability is None
    tensor_parallel_size = run.get("model.tensor_parallel_size")
    min_bytes = min_cache_bytes(
        run.model.text_config,
        tokens=sequence_tokens,
        element_bytes=1 if run.get("model.float8_kv_cache") else ELEMENT_BYTES.get(dtype, 2),
        block_tokens=CPU_BLOCK_TOKENS if on_cpu else GPU_BLOCK_TOKENS,
        gpus=run.world_size if tensor_parallel_size == "auto" else max(tensor_parallel_size, 1),
    )
    if min_bytes is None:
        return
    if cache_bytes < min_bytes:
        yield RuleViolation(
            _CACHE,
            f"a KV cache of {cache_bytes} bytes is too small: vLLM needs {min_bytes} bytes "
            f"({format_bytes(min_bytes)}) for one sequence of {sequence_tokens} tokens and one "
            "empty block",
            notes=(
                f"{run.describe(_CACHE)}; {run.describe(_LENGTH)}; model shape from "
                f"{run.model.source}",
            ),
            fixes=(run.set_fix(_CACHE, "auto"),),
            related=(_LENGTH,),
        )
