"""Set the toolkit's own attributes and methods on a model of transformers or PEFT."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from toolkit.policy.adapter_io import save_lora
from toolkit.policy.fast_generate import fast_generate, generate, load_lora
from toolkit.policy.saving import (
    push_to_hub_gguf,
    push_to_hub_merged,
    save_pretrained_gguf,
    save_pretrained_merged,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def add_toolkit_attributes(
    model: PreTrainedModel, *, copy_from: Any = None, **attributes: Any
) -> Any:
    """Set the toolkit's attributes and methods on ``model``, and return ``model``.

    ``TOOLKIT_ATTRIBUTES`` lists the names of the attributes. If ``copy_from`` is None, their values
    come from ``attributes``. If ``copy_from`` is another model, the values are copied from
    ``copy_from``, and ``copy_from`` gets the methods too.

    The methods ``fast_generate``, ``generate``, ``save_lora`` and ``load_lora`` are functions of
    ``policy.fast_generate`` and ``policy.adapter_io``. The other methods are functions of
    ``policy.saving``.
    """
    if copy_from is not None:
        attributes = {name: getattr(copy_from, name, None) for name in TOOLKIT_ATTRIBUTES}
    for name in TOOLKIT_ATTRIBUTES:
        setattr(model, name, attributes.get(name))
    # PEFT changes the layers of the model ``copy_from`` in place. So ``copy_from`` is adapted too,
    # and must have the same methods.
    for target in (model,) if copy_from is None else (model, copy_from):
        target.fast_generate = partial(fast_generate, model)
        target.save_lora = partial(save_lora, model)
        target.load_lora = partial(load_lora, model)
        target.generate = partial(generate, target)
        for method in SAVE_FUNCTIONS:
            setattr(target, method.__name__, partial(method, model))
    return model
