"""Load a model with a vLLM engine.

The engine loads the weights, and the parameters of the model are views of the engine's tensors.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError
from toolkit.config.libraries import LEGAL_RANKS, smallest_rank
from toolkit.engine import kernel_process
from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.open_engine import open_engine
from toolkit.policy.attention import choose_attention
from toolkit.policy.auto_engine import lora_section_of, resolve_auto_options, slot_shapes
from toolkit.policy.fingerprint import store_base_digests
from toolkit.policy.hf_model import choose_dtype, load_base, read_config
from toolkit.policy.load_arguments import WHERE

if TYPE_CHECKING:
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter


def load_on_engine(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None
) -> tuple[Any, Any]:
    """Load a model and its engine, and return both. The model's weights are views of the engine's
    weights. If the engine option ``share_weights`` is False, the model has its own copy of the
    weights.

    Raises:
        InputError, ConfigValueError: the checkpoint cannot be used with these arguments.

    ``open_engine`` and ``shared_model`` raise further errors. If ``shared_model`` raises one, the
    engine is closed.
    """
    checkpoint.check_model(pickle=not request.use_safetensors)
    # These calls reject a max_seq_length above the model's limit, and an attention function that
    # ignores the model's cap on attention scores. They run here because vLLM takes long to start.
    config = read_config(checkpoint, request)
    choose_attention(config, request.attn_implementation, WHERE)
    options = engine_options(checkpoint, request, adapter)
    kernel_process.send_job(options, partial(slot_shapes, checkpoint))
    engine = open_engine(options)
    try:
        if not engine.options.share_weights:
            return load_base(checkpoint, request), engine
        from toolkit.policy.shared_weights import shared_model  # noqa: PLC0415 - imports vLLM's side

        model = shared_model(engine, attn_implementation=request.attn_implementation)
        store_base_digests(model, checkpoint.folder)
    except BaseException:
        engine.close()
        raise
    return model, engine


def engine_options(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None = None
) -> EngineOptions:
    """Return the engine options for ``request``. Lengths are in tokens, and memory is in bytes."""
    options = dict(request.engine)
    options["max_lora_rank"] = _max_lora_rank(options["max_lora_rank"], adapter)
    options |= _resolve_auto_options(checkpoint, request, adapter)
    return EngineOptions(
        model=str(checkpoint.folder),
        max_model_len=request.max_seq_length,
        dtype=str(choose_dtype(request)).removeprefix("torch."),
        load_in_4bit=request.load_in_4bit,
        seed=request.random_state,
        **options,
    )


def _max_lora_rank(requested: Any, adapter: Adapter | None) -> int:
    """Return the largest adapter rank that the engine supports (``max_lora_rank``).

    "auto" means the smallest rank supported by vLLM that is large enough for the given adapter. If
    there is no adapter, the default rank of ``get_peft_model`` is used, as in a run file.
    """
    if requested != "auto":
        return int(requested)
    largest = lora_section_of(adapter).largest_rank
    if supported_rank := smallest_rank(largest):
        return supported_rank
    raise ConfigValueError(
        f"r={largest} is above the largest rank that vLLM supports, {LEGAL_RANKS[-1]}",
        where=WHERE,
        fix="load the model with fast_inference=False",
    )


def _resolve_auto_options(
    checkpoint: Checkpoint, request: LoadRequest, adapter: Adapter | None
) -> dict[str, Any]:
    """Return the engine options that the memory estimate chooses
    (``auto_engine.resolve_auto_options``), for the maximum sequence length and the dtype of
    ``request``.
    """
    text_config = read_config(checkpoint, request).get_text_config()
    length = request.max_seq_length or int(
        getattr(text_config, "max_position_embeddings", None) or 2048
    )
    dtype = str(choose_dtype(request)).removeprefix("torch.")
    return resolve_auto_options(checkpoint, request, adapter, length=length, dtype=dtype)
