"""Load a model with a vLLM engine: the engine has the weights, and the model is a view of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError
from toolkit.config.libraries import LEGAL_RANKS, smallest_rank
from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.open_engine import open_engine
from toolkit.policy.attention import choose_attention
from toolkit.policy.auto_engine import lora_of, settled
from toolkit.policy.fingerprint import note_checkpoint
from toolkit.policy.hf_model import choose_dtype, load_base, read_config
from toolkit.policy.load_arguments import WHERE

if TYPE_CHECKING:
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter


def load_on_engine(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None
) -> tuple[Any, Any]:
    """Load (model, engine). The model shares the engine's weights, unless ``share_weights`` is
    False.

    Raises:
        InputError, ConfigValueError: the checkpoint cannot be used with these arguments. Also all
            errors of ``open_engine`` and ``shared_model``; the engine is then closed.
    """
    checkpoint.check_model(pickle=not request.use_safetensors)
    # This runs before vLLM starts, to reject a max_seq_length beyond the model's, or an attention
    # function that ignores the model's cap.
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
    given |= _settled(checkpoint, request, adapter)
    return EngineOptions(
        model=str(checkpoint.folder),
        max_model_len=request.max_seq_length,
        dtype=str(choose_dtype(request)).removeprefix("torch."),
        load_in_4bit=request.load_in_4bit,
        seed=request.random_state,
        **given,
    )


def _rank(asked: Any, adapter: Adapter | None) -> int:
    """The engine's largest adapter rank. "auto" is the smallest possible rank for the given
    adapter, else for ``get_peft_model``'s default, as in a run file.
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


def _settled(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None
) -> dict[str, Any]:
    """The result of ``auto_engine.settled`` for the length and the dtype of the request."""
    text = read_config(checkpoint, request).get_text_config()
    length = request.max_seq_length or int(getattr(text, "max_position_embeddings", None) or 2048)
    dtype = str(choose_dtype(request)).removeprefix("torch.")
    return settled(checkpoint, request, adapter, length=length, dtype=dtype)
