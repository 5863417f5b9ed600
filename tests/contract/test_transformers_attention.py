"""transformers 5.17: which attention functions apply a softcap (toolkit.policy.attention)."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

pytestmark = pytest.mark.contract


def test_sdpa_ignores_the_softcap() -> None:
    q_BHTD, k_BHTD, v_BHTD = torch.randn(3, 1, 2, 5, 16).mul(9).unbind()
    layer = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False, head_dim=16)
    inputs = (layer, q_BHTD, k_BHTD, v_BHTD, None)
    plain, capped = (
        sdpa_attention_forward(*inputs, scaling=0.25, softcap=cap)[0] for cap in (None, 1.0)
    )
    assert torch.equal(plain, capped), "sdpa applies the softcap: policy.attention may allow it"
    mask = torch.full((5, 5), -torch.inf).triu(1)
    inputs = (layer, q_BHTD, k_BHTD, v_BHTD, mask)
    eager = [eager_attention_forward(*inputs, scaling=0.25, softcap=c)[0] for c in (None, 1.0)]
    torch.testing.assert_close(eager[0], plain)
    assert not torch.allclose(eager[0], eager[1], atol=0.1)


@pytest.mark.parametrize("function", [flash_attention_forward, flex_attention_forward])
def test_flash_and_flex_attention_have_the_parameter_softcap(function: object) -> None:
    assert "softcap" in inspect.signature(function).parameters
