"""Define ``model.fast_generate``: some prompts and options work with vLLM and with transformers,
others only with one of them.
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
    answers,
    check_request,
    is_vllms,
    read_prompts,
    read_sampling,
    refuse_beside_sampling_params,
)
from toolkit.policy.lora import is_peft
from toolkit.policy.saved_adapter import Adapter, put_saved, read_adapter
from toolkit.policy.tokenizer import end_ids

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

POLICY: Any = "policy"
"""The default of ``lora_request``: sample from the model with its current adapter."""

BORROWED = "toolkit_request"
"""The temporary name of a requested adapter on a model."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraRequest:
    """A saved adapter for generation, with the values that it had when it was loaded."""

    folder: Path
    adapter: Adapter


def load_lora(model: Any, folder: str | os.PathLike[str]) -> LoraRequest:
    """The request for the adapter saved in ``folder``, to pass to ``fast_generate``; the model is
    not changed.

    Raises:
        InputError, ConfigValueError: the adapter cannot be read, belongs to another base
            model, does not fit, or has a rank above the engine's.
    """
    adapter = read_adapter(folder)
    with _borrowed(model, adapter):  # raises an error if the adapter does not fit
        return LoraRequest(Path(folder), adapter)


def fast_generate(
    model: Any,
    prompts: Any = None,
    sampling_params: Any = None,
    lora_request: Any = POLICY,
    **kwargs: Any,
) -> Any:
    """Sample completions of ``prompts``: text, token ids, ``{"prompt": ...}``, or a list of these.

    Options that work with and without an engine: n, max_tokens, temperature (0 is greedy), top_p,
    top_k, min_p, repetition_penalty, stop, stop_token_ids, logprobs, seed; as keywords, or as a
    mapping or ``Sampling`` in ``sampling_params``. With an engine, ``sampling_params`` may be
    vLLM's own SamplingParams; without an engine, ``input_ids=...`` and any keyword of transformers'
    ``generate`` are passed to ``generate``.

    ``lora_request``: by default the model with its current adapter; None means the base model;
    other values are results of ``load_lora``.

    Returns:
        A list with one entry per prompt: ``.outputs[i].text``, ``.token_ids``, ``.finish_reason``.
        With ``input_ids``, the result of ``generate``.

    Raises:
        ConfigTypeError: this engine does not support an argument; the message names the one that
            does.
        ConfigValueError: prompts do not fit, or the engine rejects a value.
    """
    engine = getattr(model, "toolkit_engine", None)
    with _policy(model, lora_request) as (policy, adapter):
        if engine is None and ("input_ids" in kwargs or "inputs" in kwargs):
            return _transformers_generate(policy, adapter, prompts, sampling_params, kwargs)
        if engine is not None and is_vllms(sampling_params):
            return _vllm_generate(model, adapter, prompts, sampling_params, kwargs)
        if engine is not None:
            kwargs.pop("use_tqdm", None)
        sampling, seed = read_sampling(sampling_params, kwargs, engine=engine is not None)
        tokenizer = model.toolkit_tokenizer
        texts, ids = read_prompts(tokenizer, prompts)
        face = engine if engine is not None else _face(policy, model)
        rollout = face.generate(ids, sampling, seed=seed, adapter=adapter or False)
    return answers(tokenizer, texts, rollout, sampling, end_ids(tokenizer, model))


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' own ``generate`` of ``model``, in evaluation mode.

    After ``trainer.train()`` a model is in training mode: dropout is on, and gradient checkpointing
    disables the cache, so that all tokens except the first would be wrong.
    """
    with _evaluation(model):
        return type(model).generate(model, *args, **kwargs)


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _face(policy: Any, model: Any) -> TransformersEngine:
    tokenizer = model.toolkit_tokenizer
    return TransformersEngine(
        policy,
        pad_id=tokenizer.pad_token_id,
        end_ids=end_ids(tokenizer, model),
        max_model_len=model.max_seq_length,
        tokenizer=tokenizer,
    )


def _vllm_generate(
    model: Any, adapter: str | None, prompts: Any, sampling_params: Any, kwargs: dict[str, Any]
) -> Any:
    """Call vLLM's own generate with its own SamplingParams; returns its RequestOutputs."""
    refuse_beside_sampling_params(kwargs)
    engine = model.toolkit_engine
    texts, ids = read_prompts(model.toolkit_tokenizer, prompts)
    pairs = zip(texts, ids, strict=True)
    inputs = [{"prompt_token_ids": found} if text is None else text for text, found in pairs]
    request = engine.lora_request(adapter) if adapter else None
    return engine.vllm_generate(
        inputs, sampling_params, lora_request=request, **{"use_tqdm": False, **kwargs}
    )


def _transformers_generate(
    policy: Any, adapter: str | None, prompts: Any, sampling_params: Any, kwargs: dict[str, Any]
) -> Any:
    """Call transformers' own generate with its own arguments, in evaluation mode."""
    if prompts is not None or sampling_params is not None:
        raise ConfigTypeError(
            "input_ids cannot be used with prompts or sampling_params",
            where=WHERE,
            fix="pass prompts, or input_ids with keywords of transformers' generate",
        )
    with _evaluation(policy):
        if adapter is None and is_peft(policy):
            with policy.disable_adapter():
                return policy.generate(**kwargs)
        return policy.generate(**kwargs)


@contextmanager
def _policy(model: Any, request: Any) -> Iterator[tuple[Any, str | None]]:
    """Yield (model to sample from, name of its adapter or None for the base model). If there is an
    engine, the adapter is published to it.

    A requested adapter is on the model only in the block, under a temporary name.
    """
    engine = getattr(model, "toolkit_engine", None)
    # true inside `with model.disable_adapter():`
    plain = not is_peft(model) or model._adapters_disabled
    if request is None or (request is POLICY and plain):
        yield model, None
        return
    if request is POLICY:
        name = model.active_adapter
        if engine is not None:
            engine.publish(model, name)
        yield model, name
        return
    check_request(request, LoraRequest)
    with _borrowed(model, request.adapter) as policy:
        if engine is not None:
            engine.publish(policy, BORROWED)
        yield policy, BORROWED


@contextmanager
def _borrowed(model: Any, adapter: Adapter) -> Iterator[Any]:
    """Yield ``model`` with ``adapter`` active; the previous state is restored afterwards."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter if is_peft(model) else None
    training = model.training
    policy = put_saved(model, adapter, BORROWED).train(training)
    try:
        policy.set_adapter(BORROWED)
        yield policy
    finally:
        if active is None:
            policy.unload()
        else:
            model.set_adapter(active)
            model.delete_adapter(BORROWED)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
