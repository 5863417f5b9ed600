"""Rules on the size of the KV cache for the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import format_bytes
from toolkit.config.model_facts import CPU_BLOCK, ELEMENT_BYTES, GPU_BLOCK, least_cache_bytes
from toolkit.config.resolved import dtype_of
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
    written, length = run.value(_CACHE), run.value(_LENGTH)
    if type(written) is not int or type(length) is not int:
        return
    if run.model is None or run.engine != "vllm":
        return
    halves = {half: run.get(f"grpo.{half}") for half in ("bf16", "fp16")}
    dtype = dtype_of(run.get("model.dtype"), run.situation, grpo=halves)
    device = run.situation.device
    on_cpu = device is not None and device.compute_capability is None
    split = run.get("model.tensor_parallel_size")
    least = least_cache_bytes(
        run.model.text,
        tokens=length,
        element_bytes=1 if run.get("model.float8_kv_cache") else ELEMENT_BYTES.get(dtype, 2),
        block_tokens=CPU_BLOCK if on_cpu else GPU_BLOCK,
        cards=run.world_size if split == "auto" else max(split, 1),
    )
    if least is None:
        return
    if written < least:
        yield RuleViolation(
            _CACHE,
            f"a KV cache of {written} bytes is too small: vLLM needs {least} bytes "
            f"({format_bytes(least)}) for one sequence of {length} tokens and one empty block",
            notes=(
                f"{run.describe(_CACHE)}; {run.describe(_LENGTH)}; model shape from "
                f"{run.model.source}",
            ),
            fixes=(run.set_fix(_CACHE, "auto"),),
            related=(_LENGTH,),
        )
