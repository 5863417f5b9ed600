"""A model with a vLLM engine: the engine has the weights, and the model is a view of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigValueError
from toolkit.base.process_environment import world_size
from toolkit.config import parallel
from toolkit.config.libraries import LEGAL_RANKS, smallest_rank
from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.open_engine import open_engine
from toolkit.policy.attention import choose_attention
from toolkit.policy.auto_engine import lora_of, sized_share
from toolkit.policy.fingerprint import note_checkpoint
from toolkit.policy.hf_model import choose_dtype, load_base, read_config
from toolkit.policy.load_arguments import WHERE

if TYPE_CHECKING:
    from toolkit.config.engine_settings import Auto
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter


def load_on_engine(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None
) -> tuple[Any, Any]:
    """(model, engine): the model shares the engine's weights, unless ``share_weights`` is False.

    Raises:
        InputError, ConfigValueError: the checkpoint cannot be used with these arguments. Also all
            errors of ``open_engine`` and ``shared_model``; the engine is then closed.
    """
    checkpoint.check_model(pickle=not request.use_safetensors)
    # Before vLLM starts: rejects a max_seq_length beyond the model's, or attention without its cap.
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
    """The options of the engine for ``request``. Lengths are in tokens, memory in bytes."""
    given = dict(request.engine)
    given["max_lora_rank"] = _rank(given["max_lora_rank"], adapter)
    size = given["tensor_parallel_size"] = _split(given["tensor_parallel_size"], checkpoint)
    request = replace(request, engine={**request.engine, "tensor_parallel_size": size})
    given["gpu_memory_utilization"] = _share(checkpoint, request, adapter)
    return EngineOptions(
        model=str(checkpoint.folder),
        max_model_len=request.max_seq_length,
        dtype=str(choose_dtype(request)).removeprefix("torch."),
        load_in_4bit=request.load_in_4bit,
        seed=request.random_state,
        **given,
    )


def _rank(asked: Any, adapter: Adapter | None) -> int:
    """The largest adapter rank that the engine supports. "auto" is the smallest supported rank for
    the given adapter, else for ``get_peft_model``'s default, as in a run file.
    """
    if asked != "auto":
        return int(asked)
    largest = lora_of(adapter).largest_rank
    if legal := smallest_rank(largest):
        return legal
    raise ConfigValueError(
        f"r={largest} is above the largest rank that vLLM supports, {LEGAL_RANKS[-1]}",
        where=WHERE,
        fix="load with fast_inference=False",
    )


def _split(asked: Any, checkpoint: Checkpoint) -> int:
    """tensor_parallel_size; "auto" is the smallest size with which the part of the files for one
    GPU takes at most half of its memory. Sizing resolves "auto" of a run file instead.

    Uses the total memory, not the free memory, so that all processes get the same size.
    """
    if asked != "auto":
        return int(asked)
    if not torch.cuda.is_available():
        return 1
    whole = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    room = torch.cuda.mem_get_info()[1] // 2
    legal = parallel.sizes(checkpoint.read_json("config.json"), world_size())
    return next((size for size in legal if whole <= size * room), legal[-1])


def _share(checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None) -> float | Auto:
    """gpu_memory_utilization; sizing resolves "auto", as in a run file. Without a GPU the engine
    ignores it.
    """
    asked = request.engine["gpu_memory_utilization"]
    if asked != "auto":
        return float(asked)
    if not torch.cuda.is_available():
        return "auto"
    text = read_config(checkpoint, request).get_text_config()
    length = request.max_seq_length or int(getattr(text, "max_position_embeddings", None) or 2048)
    dtype = str(choose_dtype(request)).removeprefix("torch.")
    return sized_share(checkpoint, request, adapter, length=length, dtype=dtype) or "auto"
