"""Set the toolkit's own attributes and methods on a model of transformers or PEFT."""

from __future__ import annotations

from functools import partial
from typing import Any

from toolkit.policy.adapter_io import save_lora
from toolkit.policy.fast_generate import fast_generate, generate, load_lora
from toolkit.policy.saving import (
    push_to_hub_gguf,
    push_to_hub_merged,
    save_pretrained_gguf,
    save_pretrained_merged,
)

TOOLKIT_ATTRIBUTES = (
    "toolkit_engine",
    "vllm_engine",
    "max_seq_length",
    "toolkit_tokenizer",
    "toolkit_full_finetuning",
    "toolkit_resized",
    "toolkit_fused",
    "toolkit_source",
)
"""The attributes that are copied from a model to the PEFT model that wraps it."""
SAVE_FUNCTIONS = (
    save_pretrained_merged,
    push_to_hub_merged,
    save_pretrained_gguf,
    push_to_hub_gguf,
)


def add_toolkit_attributes(model: Any, *, like: Any = None, **carried: Any) -> Any:
    """Set the toolkit's attributes and methods on ``model``, and return ``model``.

    ``TOOLKIT_ATTRIBUTES`` lists the names of the attributes. If ``like`` is None, their values come
    from ``carried``. If ``like`` is another model, the values are copied from ``like``, and
    ``like`` gets the methods too.

    The methods ``fast_generate``, ``generate``, ``save_lora`` and ``load_lora`` are functions of
    ``policy.fast_generate`` and ``policy.adapter_io``. The other methods are functions of
    ``policy.saving``.
    """
    if like is not None:
        carried = {name: getattr(like, name, None) for name in TOOLKIT_ATTRIBUTES}
    for name in TOOLKIT_ATTRIBUTES:
        setattr(model, name, carried.get(name))
    # PEFT changes the layers of the model ``like`` in place. So ``like`` is adapted too, and must
    # have the same methods.
    for holder in (model,) if like is None else (model, like):
        holder.fast_generate = partial(fast_generate, model)
        holder.save_lora = partial(save_lora, model)
        holder.load_lora = partial(load_lora, model)
        holder.generate = partial(generate, holder)
        for method in SAVE_FUNCTIONS:
            setattr(holder, method.__name__, partial(method, model))
    return model
