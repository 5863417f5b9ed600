"""Define ``model.fast_generate``, which samples completions with vLLM or with transformers.

Most prompts and options work with both libraries. Some options work only with one of them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigTypeError
from toolkit.engine.hf_engine import TransformersEngine
from toolkit.policy.generation_prompts import (
    WHERE,
    check_lora_request,
    is_vllm_params,
    read_prompts,
    read_sampling,
    refuse_with_sampling_params,
    to_prompt_outputs,
)
from toolkit.policy.lora import is_peft
from toolkit.policy.saved_adapter import Adapter, add_saved_adapter, read_adapter
from toolkit.policy.tokenizer import end_ids

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from transformers import PreTrainedModel

CURRENT_ADAPTER: Any = "policy"
"""The default of ``lora_request``: sample from the model with its current adapter."""

TEMPORARY_ADAPTER = "toolkit_request"
"""The temporary name of the adapter of a ``LoraRequest`` on a model."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraRequest:
    """A saved adapter that ``fast_generate`` can sample with. The adapter's values were read when
    the request was created. Later changes of the folder have no effect.
    """

    folder: Path
    adapter: Adapter


def load_lora(model: PreTrainedModel, folder: str | os.PathLike[str]) -> LoraRequest:
    """Load the adapter saved in ``folder``, and return it as a request for ``fast_generate``. The
    model is not changed.

    Raises:
        InputError, ConfigValueError: the adapter cannot be read, belongs to another base
            model, does not match the model's layers, or has a rank above the engine's maximum.
    """
    adapter = read_adapter(folder)
    with _temporary_adapter(model, adapter):  # raises an error if the adapter does not fit
        return LoraRequest(Path(folder), adapter)


def fast_generate(
    model: PreTrainedModel,
    prompts: Any = None,
    sampling_params: Any = None,
    lora_request: Any = CURRENT_ADAPTER,
    **kwargs: Any,
) -> Any:
    """Sample completions of prompts.

    Args:
        model: a model of this package, with or without a vLLM engine.
        prompts: text, token ids, ``{"prompt": ...}``, or a list of these.
        sampling_params: a mapping of options, a ``Sampling``, or vLLM's own SamplingParams (only
            with an engine).
        lora_request: the adapter to sample with. By default this is the model's current adapter.
            Pass a result of ``load_lora`` for a saved adapter, or None for the base model.
        **kwargs: options. With or without an engine, the options n, max_tokens, temperature (0 is
            greedy), top_p, top_k, min_p, repetition_penalty, stop, stop_token_ids, logprobs and
            seed are supported. Without an engine, ``input_ids`` may be passed instead of
            ``prompts``. Then ``input_ids`` and all other keywords are passed to transformers'
            ``generate``.

    Returns:
        A list with one entry per prompt. The list ``.outputs`` of an entry has the completions of
        the prompt. Each completion has ``.text``, ``.token_ids`` and ``.finish_reason``. If
        ``input_ids`` is passed, the result of transformers' ``generate`` is returned instead.

    Raises:
        ConfigTypeError: the library that samples (vLLM or transformers) does not support an
            argument. If the other library supports the argument, the message says so.
        ConfigValueError: a prompt is too long, or the engine rejects a value.
    """
    engine = getattr(model, "toolkit_engine", None)
    with _select_adapter(model, lora_request) as (policy, adapter):
        if engine is None and ("input_ids" in kwargs or "inputs" in kwargs):
            return _transformers_generate(policy, adapter, prompts, sampling_params, kwargs)
        if engine is not None and is_vllm_params(sampling_params):
            return _vllm_generate(model, adapter, prompts, sampling_params, kwargs)
        if engine is not None:
            kwargs.pop("use_tqdm", None)
        sampling, seed = read_sampling(sampling_params, kwargs, engine=engine is not None)
        tokenizer = model.toolkit_tokenizer
        texts, ids = read_prompts(tokenizer, prompts)
        rollout_engine = engine if engine is not None else _transformers_engine(policy, model)
        rollout = rollout_engine.generate(ids, sampling, seed=seed, adapter=adapter or False)
    return to_prompt_outputs(tokenizer, texts, rollout, sampling, end_ids(tokenizer, model))


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' own ``generate`` of ``model``, in evaluation mode.

    After ``trainer.train()`` a model is in training mode. In this mode dropout is on, and gradient
    checkpointing disables the KV cache, so that all tokens except the first would be wrong.
    """
    with _evaluation_mode(model):
        return type(model).generate(model, *args, **kwargs)


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _transformers_engine(sampled_model: Any, model: PreTrainedModel) -> TransformersEngine:
    tokenizer = model.toolkit_tokenizer
    return TransformersEngine(
        sampled_model,
        pad_id=tokenizer.pad_token_id,
        end_ids=end_ids(tokenizer, model),
        max_model_len=model.max_seq_length,
        tokenizer=tokenizer,
    )


def _vllm_generate(
    model: PreTrainedModel,
    adapter: str | None,
    prompts: Any,
    sampling_params: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Call vLLM's own generate with vLLM's SamplingParams, and return vLLM's RequestOutputs."""
    refuse_with_sampling_params(kwargs)
    engine = model.toolkit_engine
    texts, ids = read_prompts(model.toolkit_tokenizer, prompts)
    pairs = zip(texts, ids, strict=True)
    inputs = [
        {"prompt_token_ids": prompt_ids} if prompt_text is None else prompt_text
        for prompt_text, prompt_ids in pairs
    ]
    request = engine.lora_request(adapter) if adapter else None
    return engine.vllm_generate(
        inputs, sampling_params, lora_request=request, **{"use_tqdm": False, **kwargs}
    )


def _transformers_generate(
    policy: Any, adapter: str | None, prompts: Any, sampling_params: Any, kwargs: dict[str, Any]
) -> Any:
    """Call transformers' own generate with the arguments ``kwargs``, in evaluation mode."""
    if prompts is not None or sampling_params is not None:
        raise ConfigTypeError(
            "input_ids cannot be used with prompts or sampling_params",
            where=WHERE,
            fix="pass prompts, or pass input_ids with keywords of transformers' generate",
        )
    with _evaluation_mode(policy):
        if adapter is None and is_peft(policy):
            with policy.disable_adapter():
                return policy.generate(**kwargs)
        return policy.generate(**kwargs)


@contextmanager
def _select_adapter(model: PreTrainedModel, request: Any) -> Iterator[tuple[Any, str | None]]:
    """Yield the model to sample from and the name of its adapter. The name is None for the base
    model. If the model has an engine, the adapter is copied to the engine first.

    The adapter of a ``LoraRequest`` is on the model only within the ``with`` block, under a
    temporary name.
    """
    engine = getattr(model, "toolkit_engine", None)
    # _adapters_disabled is True inside `with model.disable_adapter():`
    is_base_active = not is_peft(model) or model._adapters_disabled
    if request is None or (request is CURRENT_ADAPTER and is_base_active):
        yield model, None
        return
    if request is CURRENT_ADAPTER:
        name = model.active_adapter
        if engine is not None:
            engine.publish(model, name)
        yield model, name
        return
    check_lora_request(request, LoraRequest)
    with _temporary_adapter(model, request.adapter) as policy:
        if engine is not None:
            engine.publish(policy, TEMPORARY_ADAPTER)
        yield policy, TEMPORARY_ADAPTER


@contextmanager
def _temporary_adapter(model: PreTrainedModel, adapter: Adapter) -> Iterator[Any]:
    """Add ``adapter`` to ``model``, activate it, and yield the PEFT model. After the ``with`` block
    the previous state of the model is restored.
    """
    requires_grad_flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active_adapter = model.active_adapter if is_peft(model) else None
    was_training = model.training
    policy = add_saved_adapter(model, adapter, TEMPORARY_ADAPTER).train(was_training)
    try:
        policy.set_adapter(TEMPORARY_ADAPTER)
        yield policy
    finally:
        if active_adapter is None:
            policy.unload()
        else:
            model.set_adapter(active_adapter)
            model.delete_adapter(TEMPORARY_ADAPTER)
        for parameter, flag in requires_grad_flags:
            parameter.requires_grad_(flag)
