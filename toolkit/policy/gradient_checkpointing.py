"""Gradient checkpointing by ``use_gradient_checkpointing``: True, False, "unsloth" or "auto".

True recomputes each layer in the backward pass (arXiv 1604.06174). "unsloth" also keeps what the
recomputation starts from, one hidden state a layer, in pinned host memory: transformers'
``gradient_checkpointing_enable(offload=True)``. "auto" chooses by free memory.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from toolkit.base.errors import UnsupportedError

REFERENCE_SEQUENCES = 8
"""Sequences in the micro-batch that "auto" judges by."""


def apply_checkpointing(model: Any, mode: bool | str, *, max_seq_length: int | None) -> bool | str:
    """Switch ``model`` (a transformers or PEFT model) to ``mode`` and return it, "auto" resolved.

    What is chosen stays chosen: TRL 1.16 switches checkpointing off around each rollout and on
    again with arguments of its own, which would lose the offloading.

    Raises:
        UnsupportedError: the model has none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if mode == "auto":
        mode = choose_mode(base, max_seq_length=max_seq_length)
    if mode is not False and not getattr(base, "supports_gradient_checkpointing", True):
        raise UnsupportedError(
            f"{type(base).__name__} has no gradient checkpointing",
            where="use_gradient_checkpointing",
            fix="pass use_gradient_checkpointing=False",
        )
    base.toolkit_checkpointing = mode
    if mode is False:
        base.gradient_checkpointing_disable()
    else:
        _keep_offload(base)
        base.gradient_checkpointing_enable()
    return mode


def pause_checkpointing(model: Any) -> None:
    """Switch checkpointing off for inference; the mode is remembered."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_disable()


def resume_checkpointing(model: Any) -> None:
    """Switch back to the mode that ``apply_checkpointing`` set (off, if it never ran)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mode = getattr(base, "toolkit_checkpointing", False)
    if mode is not False:
        base.gradient_checkpointing_enable()


def _offloads(base: Any) -> bool:
    """True if hidden states go to the host: on a CPU they are there, and nothing can be pinned."""
    return bool(base.toolkit_checkpointing == "unsloth" and base.device.type != "cpu")


def _keep_offload(base: Any) -> None:
    """Make this one model's ``gradient_checkpointing_enable`` remember that it offloads.

    Read at transformers 5.17.0 and TRL 1.16.0: ``trl.models.utils.disable_gradient_checkpointing``
    re-enables with ``gradient_checkpointing_kwargs`` alone, and has no place for ``offload``.
    """
    base.gradient_checkpointing_enable = partial(_enable, base)


def _enable(
    base: Any,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """transformers' ``gradient_checkpointing_enable``, offloading where the model was asked to."""
    kwargs = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
    offload = (kwargs.pop("offload", False) or offload) and base.device.type != "cpu"
    every_n_layers = kwargs.pop("every_n_layers", every_n_layers)
    base.disable_input_require_grads()  # each enabling adds a hook to the embeddings
    type(base).gradient_checkpointing_enable(
        base, kwargs, every_n_layers=every_n_layers, offload=offload or _offloads(base)
    )


def choose_mode(base: Any, *, max_seq_length: int | None) -> bool | str:
    """What "auto" means for ``base`` now.

    False where a whole micro-batch's activations fit in half the free memory, True where its hidden
    states fit in a quarter, else "unsloth".

    A layer keeps about 34 hidden states' worth of bytes at 2 bytes a value without recomputation
    (arXiv 2205.05198, with attention that stores no score matrix), and one hidden state with it.
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
    """Bytes free on ``device`` now: the driver's count on a GPU, the kernel's on the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
