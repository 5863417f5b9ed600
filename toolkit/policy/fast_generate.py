"""``model.fast_generate``: the same prompts and options on both engines, and each engine's own
beside them.
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
"""Default of ``lora_request``: the model as it is, with the adapter that is on it."""

BORROWED = "toolkit_request"
"""Name of a requested adapter while it is on a model."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraRequest:
    """A saved adapter to generate with, as it was when it was loaded."""

    folder: Path
    adapter: Adapter


def load_lora(model: Any, folder: str | os.PathLike[str]) -> LoraRequest:
    """A request for the adapter saved in ``folder``, for ``fast_generate``; the model is not
    changed.

    Raises:
        InputError, ConfigValueError: it cannot be read, is another base's, does not fit, or has a
            rank above the engine's.
    """
    adapter = read_adapter(folder)
    with _borrowed(model, adapter):  # whatever does not fit is refused here
        return LoraRequest(Path(folder), adapter)


def fast_generate(
    model: Any,
    prompts: Any = None,
    sampling_params: Any = None,
    lora_request: Any = POLICY,
    **kwargs: Any,
) -> Any:
    """Completions of ``prompts``: text, token ids, ``{"prompt": ...}``, or a list of these.

    Options that both engines take: n, max_tokens, temperature (0 is greedy), top_p, top_k, min_p,
    repetition_penalty, stop, stop_token_ids, logprobs, seed; as keywords, as a mapping or
    ``Sampling`` in ``sampling_params``. With an engine, ``sampling_params`` may be vLLM's own
    SamplingParams; without one, ``input_ids=...`` and any keyword of transformers' ``generate`` go
    straight to it.

    ``lora_request``: left out, the model as it is with its adapter; None, the base model; else what
    ``load_lora`` gave.

    Returns:
        A list with an entry a prompt: ``.outputs[i].text``, ``.token_ids``, ``.finish_reason``.
        With ``input_ids``, what ``generate`` returns.

    Raises:
        ConfigTypeError: an argument that this engine does not take, naming the one that does.
        ConfigValueError: prompts that do not fit, or a value that the engine refuses.
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
    """transformers' own ``generate`` of ``model``, in evaluation mode for the while.

    In training mode, as a model is after ``trainer.train()``, dropout is on, and gradient
    checkpointing leaves the cache out, so that all tokens but the first are wrong.
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
    """vLLM's own generate, with its own SamplingParams; its RequestOutputs come back."""
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
    """transformers' own generate, with its own arguments; evaluation mode for the while."""
    if prompts is not None or sampling_params is not None:
        raise ConfigTypeError(
            "input_ids goes with neither prompts nor sampling_params",
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
    """(model to sample from, name of its adapter or None for the base), known to the engine if any.

    A requested adapter is on the model, under a name of its own, only for the while.
    """
    engine = getattr(model, "toolkit_engine", None)
    # PEFT's name for being inside `with model.disable_adapter():`
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
    """``model`` with ``adapter`` active on it; afterwards everything is as it was."""
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
