"""Which of Hugging Face's attention functions computes what the model is."""

from __future__ import annotations

from typing import Any

from toolkit.base.errors import ConfigValueError

DROPS_SOFTCAP = frozenset({"sdpa", "paged|sdpa"})
"""Hugging Face's default takes ``softcap`` among its keywords and computes without it, in silence
(``sdpa_attention_forward``, read at transformers 5.17; held by tests/contract).
"""


def choose_attention(config: Any, asked: str | None, where: str) -> str | None:
    """The ``attn_implementation`` for the model of ``config``; None is Hugging Face's default.

    Gemma 2 caps its attention scores (``attn_logit_softcapping``). vLLM does so on every device;
    the default here would not, and the policy under training would be another than the one that is
    sampled: by 0.4 nats with a large adapter on a small model. Such a model gets ``"eager"``.

    Raises:
        ConfigValueError: ``asked`` names a function that leaves the cap out.
    """
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is None:
        return asked
    if asked in DROPS_SOFTCAP:
        raise ConfigValueError(
            f"attn_implementation={asked!r} leaves out the model's attn_logit_softcapping"
            f" ({cap:g})",
            where=where,
            fix='leave attn_implementation out ("eager" is chosen then), or use "flex_attention"',
        )
    return "eager" if asked is None else asked
