"""Choose the settings of the engine. Each setting that is "auto" gets a value. From these settings,
the sizer then computes the memory of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from toolkit.config.libraries import LEGAL_RANKS
from toolkit.config.model_facts import CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS
from toolkit.config.parallel import parallel_size
from toolkit.sizing import lora_bytes
from toolkit.sizing.weight_bytes import format_on_load

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.device import Device
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.weight_formats import Quantization
    from toolkit.sizing.workload import Workload

MAX_SEQUENCES = (
    1024  # vLLM's default on large cards; more sequences only cost sampler and graph memory
)
BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """The engine settings, with a value for every "auto"."""

    on_gpu: bool
    dtype: str
    quantization: Quantization | None
    max_lora_rank: int
    max_loras: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enforce_eager: bool
    float8_kv_cache: bool
    sleep: bool
    share_weights: bool
    block_tokens: int
    lora_modules: tuple[str, ...]
    tensor_parallel: int = 1
    copies_bytes: int = 0
    """Bytes of the 16-bit copies of 4-bit weights that exist during a rollout (sizing/dequantized).
    """

    def with_sleep(self, sleep: bool) -> EnginePlan:
        return replace(self, sleep=sleep)

    def with_copies(self, nbytes: int) -> EnginePlan:
        return replace(self, copies_bytes=nbytes)


def plan_engine(
    config: RunConfig, spec: ModelSpec, work: Workload, device: Device | None
) -> EnginePlan:
    """Return the engine plan for ``config``, in which model.dtype must not be "auto". A value that
    the run file sets is used unchanged. A value for "auto" is computed from the workload. Raises
    ConfigError for a LoRA rank that vLLM does not support.
    """
    model = config.model
    if model.max_num_seqs == "auto":
        eval_batch_size = config.grpo.get("per_device_eval_batch_size", 1)
        needed_sequences = max(
            work.rollouts, eval_batch_size if isinstance(eval_batch_size, int) else 1
        )
        sequences = min(needed_sequences, MAX_SEQUENCES)
    else:
        sequences = model.max_num_seqs
    if model.max_num_batched_tokens == "auto":
        # A scheduler step never needs more tokens than all prompts and completions have together,
        # but it needs at least one token of each sequence. Without chunked prefill a whole prompt
        # must fit.
        needed_tokens = max(sequences * work.sequence_tokens, model.max_seq_length, 256)
        min_tokens = (
            sequences if model.enable_chunked_prefill else max(sequences, model.max_seq_length)
        )
        batched_tokens = max(min(BATCHED_TOKENS, needed_tokens), min_tokens)
    else:
        batched_tokens = model.max_num_batched_tokens
    rank = model.max_lora_rank
    if rank == "auto":
        # Without an engine, any rank can be trained.
        rank = lora_bytes.legal_rank(
            work.rank if work.uses_engine else min(work.rank, LEGAL_RANKS[-1])
        )
    return EnginePlan(
        on_gpu=device is not None,
        dtype=model.dtype,
        quantization=format_on_load(spec, model),
        max_lora_rank=rank,
        max_loras=model.max_loras,
        max_num_seqs=sequences,
        max_num_batched_tokens=batched_tokens,
        max_model_len=model.max_seq_length,
        enforce_eager=model.enforce_eager or device is None,
        float8_kv_cache=model.float8_kv_cache,
        sleep=model.enable_sleep_mode is True,
        share_weights=model.share_weights,
        block_tokens=CPU_BLOCK_TOKENS if device is None else GPU_BLOCK_TOKENS,
        lora_modules=lora_bytes.slot_modules(work.targets),
        tensor_parallel=parallel_size(model.tensor_parallel_size) if work.uses_engine else 1,
    )
