"""Apply the mode of gradient checkpointing that ``use_gradient_checkpointing`` sets.

The mode is True, False, "unsloth" or "auto". True recomputes each layer in the backward pass (arXiv
1604.06174). "unsloth" also moves the saved input of each layer to pinned host memory
(``gradient_checkpointing_enable(offload=True)`` of transformers). "auto" chooses one of the other
modes depending on the free memory.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


REFERENCE_SEQUENCES = 8
"""The number of sequences in a micro-batch that "auto" assumes."""


def apply_checkpointing(
    model: PreTrainedModel, mode: bool | str, *, max_seq_length: int | None
) -> bool | str:
    """Set the gradient checkpointing of ``model`` (a transformers or PEFT model) to ``mode``.
    Returns the mode. If ``mode`` is "auto", this is the mode that was chosen.

    TRL 1.16 switches checkpointing off before each rollout and on again after the rollout. TRL then
    passes its own arguments, which do not include offloading. This function makes sure that the
    model has the same mode again after each rollout.

    Raises:
        UnsupportedError: the model does not support gradient checkpointing.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if mode == "auto":
        mode = choose_mode(base, max_seq_length=max_seq_length)
    if mode is not False and not getattr(base, "supports_gradient_checkpointing", True):
        raise UnsupportedError(
            f"{type(base).__name__} does not support gradient checkpointing",
            where="use_gradient_checkpointing",
            fix="pass use_gradient_checkpointing=False",
        )
    base.toolkit_checkpointing = mode
    if mode is False:
        base.gradient_checkpointing_disable()
    else:
        _override_enable(base)
        base.gradient_checkpointing_enable()
    return mode


def pause_checkpointing(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing off for inference. The model keeps a record of its mode, so
    that ``resume_checkpointing`` can switch it on again.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_disable()


def resume_checkpointing(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing back to the mode that ``apply_checkpointing`` set. If
    ``apply_checkpointing`` was never called, checkpointing stays off.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mode = getattr(base, "toolkit_checkpointing", False)
    if mode is not False:
        base.gradient_checkpointing_enable()


def _must_offload(base: Any) -> bool:
    """Return True if the hidden states must be moved to host memory. On a CPU they are in host
    memory already.
    """
    return bool(base.toolkit_checkpointing == "unsloth" and base.device.type != "cpu")


def _override_enable(base: Any) -> None:
    """Override ``gradient_checkpointing_enable`` of this model so that offloading stays on.

    The context manager ``trl.models.utils.disable_gradient_checkpointing`` of TRL 1.16.0 enables
    checkpointing again when its block ends. It then passes only ``gradient_checkpointing_kwargs``
    to ``gradient_checkpointing_enable`` of transformers 5.17.0, so offloading would be off.
    """
    base.gradient_checkpointing_enable = partial(_enable_checkpointing, base)


def _enable_checkpointing(
    base: Any,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Call transformers' ``gradient_checkpointing_enable``, with offloading if it was chosen for
    the model.
    """
    kwargs = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
    offload = (kwargs.pop("offload", False) or offload) and base.device.type != "cpu"
    every_n_layers = kwargs.pop("every_n_layers", every_n_layers)
    base.disable_input_require_grads()  # each call adds another hook to the embeddings
    type(base).gradient_checkpointing_enable(
        base, kwargs, every_n_layers=every_n_layers, offload=offload or _must_offload(base)
    )


def choose_mode(base: Any, *, max_seq_length: int | None) -> bool | str:
    """Return the mode that "auto" means for ``base`` with the memory that is free now.

    The mode is False if all activations of a micro-batch fit in half of the free memory. Else it is
    True if the hidden states of a micro-batch (one per layer) fit in a quarter of the free memory.
    Else it is "unsloth".

    Without recomputation, a layer keeps about as many bytes as 17 hidden states. This is the value
    of arXiv 2205.05198 (34 bytes for each 2-byte value of a hidden state) for attention that does
    not store a score matrix. With recomputation, a layer keeps one hidden state.
    """
    config = base.config.get_text_config()
    tokens = REFERENCE_SEQUENCES * (max_seq_length or config.max_position_embeddings)
    value_bytes = torch.finfo(base.dtype).bits // 8
    state_bytes = tokens * config.hidden_size * config.num_hidden_layers * value_bytes
    free_bytes = free_memory_bytes(base.device)
    if 17 * state_bytes < free_bytes // 2:
        return False
    return True if state_bytes < free_bytes // 4 else "unsloth"


def free_memory_bytes(device: torch.device) -> int:
    """Return the bytes that are free on ``device`` now. On a GPU the CUDA driver reports them, and
    on the host the operating system does.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
