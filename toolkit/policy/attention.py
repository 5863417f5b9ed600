"""Choose a Hugging Face attention function that computes the same attention as vLLM for the given
model.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from toolkit.base.errors import ConfigValueError
from toolkit.config.libraries import model_type
from toolkit.config.supported_features import attention_machine_problem, attention_problem


def choose_attention(
    config: Any, requested: str | None, where: str, *, trusted: bool = False
) -> str | None:
    """Return the ``attn_implementation`` for the model of ``config``. None means Hugging Face's
    default.

    Gemma 2 caps its attention scores (``attn_logit_softcapping``). vLLM applies the cap on every
    device, but Hugging Face's default attention does not. So the trainer and vLLM would compute
    different log-probabilities. The measured difference is 0.4 nats for a large adapter on a small
    model. For this reason a model with a cap gets ``"eager"``, which applies the cap.

    Raises:
        ConfigValueError: the attention function ``requested`` does not exist, ignores the cap, or
            is not supported by the model or this machine (``config.supported_features``).
    """
    text = config.get_text_config()
    cap, family = getattr(text, "attn_logit_softcapping", None), getattr(text, "model_type", "")
    problem = attention_problem(
        requested, softcap=cap, supports=model_type(family).attention_support, trusted=trusted
    ) or attention_machine_problem(
        requested,
        on_gpu=torch.cuda.is_available(),
        dtype="auto",
        is_installed=find_spec("flash_attn") is not None,
    )
    if problem is not None:
        raise ConfigValueError(problem.message, where=where, fix=problem.advice)
    return "eager" if requested is None and cap is not None else requested
