"""Build a Hugging Face model whose parameters are views of the engine's tensors.

The model is created without memory on torch's meta device. Then every parameter is replaced by a
view of an engine's tensor.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from toolkit.base.errors import ConfigValueError, DefectError, UnsupportedError
from toolkit.engine.layer_splits import EngineSplits
from toolkit.engine.live_weights import engine_name, find_live_weights, is_packed, logical_shape
from toolkit.engine.mesh import current_mesh
from toolkit.engine.rollout_request import Sampling
from toolkit.policy.base_checksum import CHECKSUMS_ATTRIBUTE, base_checksums
from toolkit.policy.bnb_layers import mark_4bit, replace_by_linear_4bit
from toolkit.policy.skeleton import build_meta_model
from toolkit.policy.tensor_parallel.split import split_model
from toolkit.policy.weight_names import (
    FALLBACK_ADVICE,
    SHARE_WEIGHTS_KEY,
    EngineTensors,
    expected_checkpoint_names,
    plan_slices,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn
    from transformers import PreTrainedModel

    from toolkit.engine.engine import Engine
    from toolkit.engine.live_weights import LiveWeights
    from toolkit.policy.weight_names import Slice

SPOT_TOKENS = 8
SPOT_TOLERANCE = {torch.float32: 1e-3}
SPOT_TOLERANCE_HALF = 0.5
"""The largest difference between the engine's and the model's log-probability of a token that is
accepted as rounding, in nats. ``SPOT_TOLERANCE_HALF`` applies to dtypes that are not in
``SPOT_TOLERANCE``.
"""


def shared_model(
    engine: Engine, *, attn_implementation: str | None = None, check: bool = True
) -> PreTrainedModel:
    """Create a Hugging Face model of the engine's checkpoint, without weights of its own.

    Every parameter is a frozen view of an engine's tensor (``requires_grad`` is False). The model
    has its own buffers (rotary tables). These checks are made:

    * Every parameter is in the engine's memory and has the right shape and dtype.
    * The checkpoint and the model have the same tensors.
    * If ``check`` is True, the log-probabilities of a few tokens agree with the engine's.

    Delete all references to the model soon after the engine is closed. The memory of the weights is
    freed only when the engine is closed and the model is deleted.

    Args:
        engine: a running engine.
        attn_implementation: Hugging Face's attention function. None means the model's default.
        check: whether to compare log-probabilities of a few tokens.

    Raises:
        UnsupportedError: a weight cannot be shared. The message names the weight.
    """
    if not engine.options.share_weights:
        raise UnsupportedError(
            "the engine was opened with share_weights: false, so its weights cannot be shared",
            where=SHARE_WEIGHTS_KEY,
            fix="open the engine with share_weights: true, or load the trainer's model separately",
        )
    model = build_meta_model(engine, attn_implementation)
    refuse_long_rope(engine, model)
    if (model_mesh := current_mesh()) is not None:
        split_model(model, EngineSplits(engine.module), model_mesh)
    live = find_live_weights(engine.module)
    check_tensor_names(model, live)
    bind_parameters(model, live, engine)
    assert_no_own_memory(model, live)
    model.eval()
    if check:
        spot_check(engine, model)
    setattr(model, CHECKSUMS_ATTRIBUTE, base_checksums(model))
    return model


def refuse_long_rope(engine: Engine, model: PreTrainedModel) -> None:
    """Raise an error if a model with LongRoPE (Phi-3) has a max_seq_length above its original
    length. In this case vLLM 0.25 to 0.31 uses the long rope factors for every sequence. Hugging
    Face uses the long factors only for sequences above the original length.

    Raises:
        UnsupportedError: max_seq_length is above the original length.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and engine.options.max_model_len > original:
        raise UnsupportedError(
            f"max_seq_length {engine.options.max_model_len} is above {original}, the original "
            f"length of {type(model).__name__}. Then vLLM uses the long rope factors for every "
            "sequence, but the trainer uses them only for sequences above the original length",
            where="model.max_seq_length",
            fix=f"set max_seq_length: {original}, or set fast_inference: false",
        )


def check_tensor_names(model: PreTrainedModel, live: LiveWeights) -> None:
    """Check that the checkpoint has exactly the tensors of the model.

    vLLM itself may accept additional tensors, and leaves missing tensors uninitialised. Additional
    tensors that Hugging Face ignores are accepted here too.

    Raises:
        UnsupportedError: the checkpoint has additional tensors, or tensors are missing. The message
            names them.
    """
    if not live.read_names:
        return  # the names were not recorded, because another loader has read the checkpoint
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    model_names = expected_checkpoint_names(shapes, live.read_names)
    accepted_names = model_names | {name.removeprefix(prefix) for name in model_names}
    ignored_patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"\.rotary_emb\.inv_freq$",
    ]
    pattern = re.compile("|".join(f"(?:{regex})" for regex in ignored_patterns))
    refuse_tensors(
        "has tensors that the model does not have", live.read_names - accepted_names, pattern, model
    )
    checkpoint_names = live.read_names | {prefix + name for name in live.read_names}
    for group in tied_names(model):
        if group & checkpoint_names:
            checkpoint_names |= group
    refuse_tensors("lacks tensors of the model", model_names - checkpoint_names, pattern, model)


def refuse_tensors(
    problem: str, names: Iterable[str], ignored: re.Pattern[str], model: nn.Module
) -> None:
    """Raise an error for the tensors ``names``, except those that match the pattern ``ignored``.
    ``problem`` says in the message what is wrong with these tensors.

    Raises:
        UnsupportedError: there are such tensors. The message contains the first five names.
    """
    affected = sorted(name for name in names if not ignored.search(name))
    if affected:
        remainder = f" (and {len(affected) - 5} more)" if len(affected) > 5 else ""
        raise UnsupportedError(
            f"the checkpoint {problem} ({type(model).__name__}): "
            f"{', '.join(affected[:5])}{remainder}",
            where="model.model_name",
            fix="use a complete checkpoint of the model",
        )


def bind_parameters(model: PreTrainedModel, live: LiveWeights, engine: Engine) -> None:
    """Replace every parameter of ``model`` by a frozen view of an engine's tensor."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    sources = EngineTensors(
        shapes={name: logical_shape(tensor) for name, tensor in live.parameters.items()},
        packed_modules=live.packed_modules,
        padded_names=live.padded_names,
        rewritten_names=live.rewritten_names,
    )
    plan = plan_slices(
        shapes, tied_names(model), sources, lambda name: engine_name(engine.module, name)
    )
    view_by_slice: dict[Slice, nn.Parameter] = {}
    for name, row_slice in plan.items():
        path, _, attribute = name.rpartition(".")
        source = live.parameters[row_slice.source]
        if is_packed(source):
            replace_by_linear_4bit(model, path, source, row_slice)
            mark_4bit(model)
            continue
        owner = model.get_submodule(path)
        tensor = source.detach()[row_slice.start : row_slice.start + row_slice.rows]
        expected = getattr(owner, attribute).dtype
        if tensor.dtype != expected:
            raise UnsupportedError(
                f"{name} has dtype {expected} in the model, but {tensor.dtype} in the engine",
                where=SHARE_WEIGHTS_KEY,
                fix=FALLBACK_ADVICE,
            )
        # Create only one Parameter per slice, so that tied weights stay one object.
        view = view_by_slice.setdefault(row_slice, torch.nn.Parameter(tensor, requires_grad=False))
        setattr(owner, attribute, view)


def tied_names(model: nn.Module) -> list[frozenset[str]]:
    """Return groups of parameter names. All names in a group belong to one (tied) parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [frozenset(names) for names in groups.values() if len(names) > 1]


def assert_no_own_memory(model: nn.Module, live: LiveWeights) -> None:
    """Check that the memory of every parameter belongs to the engine's tensors.

    Raises:
        DefectError: a parameter has its own memory.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in live.parameters.values()}
    unshared = [
        name
        for name, p in model.named_parameters()
        if p.untyped_storage().data_ptr() not in storages
    ]
    if unshared:
        raise DefectError(
            f"these parameters are not in the engine's storage: {', '.join(unshared[:5])}"
        )


def spot_check(engine: Engine, model: PreTrainedModel) -> float:
    """Sample a few tokens greedily with the engine, and compare the engine's log-probabilities of
    these tokens with the model's. Returns the largest difference, in nats.

    Raises:
        UnsupportedError: the difference is more than rounding, so engine and model compute
            different functions.
        ConfigValueError: the model's logits are not finite.
    """
    device = next(model.parameters()).device
    prompt = [
        1 + 7 * i % (model.config.get_text_config().vocab_size - 1) for i in range(SPOT_TOKENS)
    ]
    rollout = engine.generate(
        [prompt], Sampling(max_tokens=SPOT_TOKENS, temperature=0.0), seed=0, adapter=False
    )
    if rollout.logprobs is None:
        raise DefectError("the engine returned no log-probabilities")
    engine_logprobs = torch.tensor(
        [[value or 0.0 for value in position] for position in rollout.logprobs[0]], device=device
    )[:, 0]
    tokens = torch.tensor([prompt + rollout.completion_ids[0]], device=device)
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
    # With greedy sampling, the engine's log-probabilities are those of the unmodified distribution.
    model_logprobs = torch.log_softmax(logits, -1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
    if not bool(model_logprobs.isfinite().all()):
        raise ConfigValueError(
            "the model's logits are not finite. Either its weights contain NaN or infinity, or "
            f"values exceed the range of {str(engine.dtype).removeprefix('torch.')}",
            where=engine.options.model,
            fix="if dtype is float16, use bfloat16 or float32. Otherwise copy the checkpoint again",
        )
    max_difference = float((model_logprobs - engine_logprobs).abs().max())
    limit = SPOT_TOLERANCE.get(engine.dtype, SPOT_TOLERANCE_HALF)
    if engine.options.float8_kv_cache:
        # A quantized KV cache rounds keys and values for every dtype.
        limit = SPOT_TOLERANCE_HALF
    if not max_difference <= limit:
        raise UnsupportedError(
            "with the same weights, the log-probabilities of the engine and of the Hugging Face "
            f"model differ by {max_difference:.3g} nats, but rounding explains only {limit:g}. So "
            f"vLLM computes {type(model).__name__} differently on this machine",
            where=SHARE_WEIGHTS_KEY,
            fix="set fast_inference: false, and report the difference as a defect of the toolkit",
        )
    return max_difference
