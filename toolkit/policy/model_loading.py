"""Load the model and the tokenizer of a ``LoadRequest``. The model may have an engine and an
adapter.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError, ToolkitError, ToolkitWarning
from toolkit.policy.cuda_allocator import use_expandable_segments
from toolkit.policy.fused_kernels import CONFIG_KEY, use_fused_kernels
from toolkit.policy.gradient_checkpointing import apply_checkpointing
from toolkit.policy.hf_model import check_quantization, load_base
from toolkit.policy.model_attributes import add_toolkit_attributes
from toolkit.policy.model_files import find_checkpoint
from toolkit.policy.saved_adapter import add_saved_adapter, read_adapter
from toolkit.policy.saving import ModelSource
from toolkit.policy.tokenizer import fix_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.policy.fused_kernels import AppliedKernels
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter


def load_model_and_tokenizer(
    request: LoadRequest,
    adapter_folder: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Any, Any]:
    """Load the model and the tokenizer of ``request``, and return both.

    If ``request.model_name`` is the folder of an adapter, the adapter and its base model are
    loaded. If ``adapter_folder`` is given, ``request.model_name`` must be the base model, and the
    adapter in that folder is added to it. ``tokenizer`` is the result of ``read_tokenizer``. If
    ``tokenizer`` is None, this function reads the tokenizer.

    Raises:
        InputError, ConfigValueError, UnsupportedError, MissingExtraError: see ``from_pretrained``.
    """
    check_quantization(request)
    use_expandable_segments()
    checkpoint, adapter = _find_base_and_adapter(request, adapter_folder)
    if request.fast_inference:
        from toolkit.policy.engine_model import load_on_engine  # noqa: PLC0415 - vLLM is optional

        model, engine = load_on_engine(checkpoint, request, adapter)
    else:
        model, engine = load_base(checkpoint, request), None
    if tokenizer is None:
        tokenizer = _read_tokenizer_of(checkpoint, adapter, request)
    return _prepare_model(model, engine, checkpoint, request, adapter, tokenizer)


def read_tokenizer(request: LoadRequest) -> Any:
    """Read the tokenizer that ``load_model_and_tokenizer`` returns, without loading the model. It
    can be used to check lengths and chat templates.

    The tokenizer's padding is not set yet, because it depends on the model. Raises InputError if
    the tokenizer cannot be read.
    """
    return _read_tokenizer_of(*_find_base_and_adapter(request), request)


def _find_base_and_adapter(
    request: LoadRequest, adapter_folder: Path | None = None
) -> tuple[Checkpoint, Adapter | None]:
    checkpoint = _find_checkpoint(request, request.model_name)
    if adapter_folder is not None:
        return checkpoint, read_adapter(adapter_folder)
    if not checkpoint.is_adapter:
        return checkpoint, None
    adapter = read_adapter(checkpoint.folder)
    return _base_checkpoint_of(request, adapter), adapter


def _find_checkpoint(request: LoadRequest, name: str) -> Checkpoint:
    pickle = not request.use_safetensors
    return find_checkpoint(name, revision=request.revision, token=request.token, pickle=pickle)


def _base_checkpoint_of(request: LoadRequest, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint of the base model that ``adapter`` was trained on. The adapter's config
    has the name of this checkpoint.
    """
    name = adapter.config.base_model_name_or_path
    if not name:
        raise InputError(
            "adapter_config.json does not name its base model", where=str(adapter.folder)
        )
    revision = getattr(adapter.config, "revision", None)
    return _find_checkpoint(replace(request, revision=revision), str(name))


def _prepare_model(
    model: PreTrainedModel,
    engine: Any,
    base: Checkpoint,
    request: LoadRequest,
    adapter: Adapter | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Any, Any]:
    """Set the model's name and padding, and add the adapter (if one is given) and the toolkit's
    methods. Returns the model and the tokenizer.
    """
    # transformers stores the snapshot's folder as the model's name, but adapters must record the
    # name that the user gave.
    model.name_or_path = model.config._name_or_path = base.name
    if request.fix_tokenizer:
        fix_tokenizer(tokenizer, model)
    max_positions = getattr(model.config, "max_position_embeddings", None)
    max_seq_length = request.max_seq_length or max_positions
    add_toolkit_attributes(
        model,
        toolkit_engine=engine,
        # This is a weak reference to vLLM, so that closing the engine can free its memory while the
        # model still exists.
        vllm_engine=None if engine is None else weakref.proxy(engine.llm),
        max_seq_length=max_seq_length,
        toolkit_tokenizer=tokenizer,
        toolkit_full_finetuning=request.full_finetuning,
        toolkit_resized=request.resize_model_vocab is not None,
        toolkit_fused=_apply_fused_kernels(model, request),
        toolkit_source=ModelSource.without_token(base, request),
    )
    mode = request.use_gradient_checkpointing
    if adapter is not None:
        model = add_toolkit_attributes(
            publish_to_engine(add_saved_adapter(model, adapter)), copy_from=model
        )
        model.train()
    if adapter is not None or request.full_finetuning:
        apply_checkpointing(model, mode, max_seq_length=max_seq_length)
    return model, tokenizer


def _apply_fused_kernels(model: PreTrainedModel, request: LoadRequest) -> AppliedKernels | None:
    """Use fused kernels in ``model``. A warning lists the layers that do not use them."""
    applied = use_fused_kernels(model, request.fused_kernels)
    if applied is not None and applied.refusal_reasons:
        details = "; ".join(f"{name}: {reason}" for name, reason in applied.refusal_reasons.items())
        warnings.warn(
            f"{CONFIG_KEY}: some layers do not use a fused kernel, so they are slower ({details})",
            ToolkitWarning,
            stacklevel=2,
        )
    return applied


def publish_to_engine(peft_model: PreTrainedModel) -> Any:
    """If the model has an engine, copy the new adapter to the engine. Returns ``peft_model``.

    So an unsupported adapter raises an error here, and not only in the first rollout.

    Raises:
        UnsupportedError, ConfigValueError: the engine does not support the adapter. The adapter is
            removed from the model.
    """
    engine = getattr(peft_model, "toolkit_engine", None)
    if engine is not None:
        try:
            engine.publish(peft_model)
        except ToolkitError:
            peft_model.unload()
            raise
    return peft_model


def _read_tokenizer_of(base: Checkpoint, adapter: Adapter | None, request: LoadRequest) -> Any:
    has_tokenizer = adapter is not None and (adapter.folder / "tokenizer_config.json").is_file()
    return load_tokenizer(
        adapter.folder if adapter and has_tokenizer else base.folder,
        max_seq_length=request.max_seq_length,
        trust_remote_code=request.trust_remote_code,
    )
