"""A model with a vLLM engine on it: the engine holds the weights, the model is a view of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigValueError
from toolkit.base.process_environment import world_size
from toolkit.config import parallel
from toolkit.config.lora_ranks import LEGAL_RANKS, smallest_rank
from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.open_engine import open_engine
from toolkit.policy.attention import choose_attention
from toolkit.policy.fingerprint import note_checkpoint
from toolkit.policy.hf_model import choose_dtype, load_base, read_config
from toolkit.policy.load_arguments import WHERE

if TYPE_CHECKING:
    from toolkit.config.engine_settings import Auto
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter

DEFAULT_RANK = 64
"""max_lora_rank "auto" without an adapter to read it from: the drop-in API's default."""


def load_on_engine(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None
) -> tuple[Any, Any]:
    """(model, engine): the model borrows the engine's weights, unless ``share_weights`` is False.

    Raises:
        InputError, ConfigValueError: the checkpoint cannot be used with these arguments.
        Whatever ``open_engine`` and ``shared_model`` raise; the engine is closed then.
    """
    checkpoint.check_model(pickle=not request.use_safetensors)
    # Before vLLM starts: refuses a max_seq_length beyond the model's, an attention without its cap.
    config = read_config(checkpoint, request)
    choose_attention(config, request.attn_implementation, WHERE)
    engine = open_engine(engine_options(checkpoint, request, adapter))
    try:
        if not engine.options.share_weights:
            return load_base(checkpoint, request), engine
        from toolkit.policy.shared_weights import shared_model  # noqa: PLC0415 - imports vLLM's side

        model = shared_model(engine, attn_implementation=request.attn_implementation)
        note_checkpoint(model, checkpoint.folder)
    except BaseException:
        engine.close()
        raise
    return model, engine


def engine_options(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None = None
) -> EngineOptions:
    """What the engine of ``request`` is built with. Lengths in tokens, memory in bytes."""
    given = dict(request.engine)
    given["max_lora_rank"] = _rank(given["max_lora_rank"], adapter)
    given["gpu_memory_utilization"] = _share(given["gpu_memory_utilization"])
    given["tensor_parallel_size"] = _split(given["tensor_parallel_size"], checkpoint)
    return EngineOptions(
        model=str(checkpoint.folder),
        max_model_len=request.max_seq_length,
        dtype=str(choose_dtype(request)).removeprefix("torch."),
        load_in_4bit=request.load_in_4bit,
        seed=request.random_state,
        **given,
    )


def _rank(asked: Any, adapter: Adapter | None) -> int:
    """The largest adapter rank that the engine has room for; "auto" fits the adapter at hand."""
    if asked != "auto":
        return int(asked)
    if adapter is None:
        return DEFAULT_RANK
    largest = max(adapter.config.r, *(adapter.config.rank_pattern or {}).values(), 0)
    if legal := smallest_rank(largest):
        return legal
    raise ConfigValueError(
        f"r={largest} is above the largest rank that vLLM serves, {LEGAL_RANKS[-1]}",
        where=WHERE,
        fix="load with fast_inference=False",
    )


def _split(asked: Any, checkpoint: Checkpoint) -> int:
    """tensor_parallel_size; "auto" is the smallest with which a card's part of the files takes at
    most half of the card. A run file's "auto" is sized by its budget instead.

    Total memory and not what is free, as all processes have to find the same.
    """
    if asked != "auto":
        return int(asked)
    if not torch.cuda.is_available():
        return 1
    whole = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    room = torch.cuda.mem_get_info()[1] // 2
    legal = parallel.sizes(checkpoint.read_json("config.json"), world_size())
    return next((size for size in legal if whole <= size * room), legal[-1])


def _share(asked: Any) -> float | Auto:
    """gpu_memory_utilization; "auto" is half of what is free now, the other half being the
    trainer's.

    A run file's "auto" is sized by its budget instead. Without a GPU the engine does not read it.
    """
    if asked != "auto":
        return float(asked)
    if not torch.cuda.is_available():
        return "auto"
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return max(round(free_bytes / total_bytes / 2, 2), 0.01)
