"""Fused kernels in a model's own layers: a kernel is used only if it computes the same as the
layer, and one key disables all kernels.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import gelu, silu
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.base.errors import ConfigError, MissingExtraError
from toolkit.policy import fused_kernels
from toolkit.policy.fused_kernels import Kernels, apply_kernels, load_kernels, use_fused_kernels

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"attn_implementation": "eager"},
    "gemma3_text": {},
    "olmo2": {},
    "phi3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "glm": {},
}


# --- the kernels of Liger 0.8.5, written in plain torch


def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place  # in place, the kernel would overwrite a gradient that is still needed
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return (offset + weight) * normed.to(x.dtype)
    return ((offset + weight.float()) * normed).to(x.dtype)


def rotary(q, k, cos, sin):
    def rotate_half(x):
        first, second = x[..., : cos.shape[-1]].chunk(2, -1)
        angles = torch.cat([-second, first], -1) * sin.unsqueeze(1)
        return torch.cat([x[..., : cos.shape[-1]] * cos.unsqueeze(1) + angles,
                          x[..., cos.shape[-1] :]], -1)  # fmt: skip

    return rotate_half(q), rotate_half(k)


KERNELS = Kernels(
    rms_norm,
    rotary,
    lambda gate, up: silu(gate) * up,
    lambda gate, up: gelu(gate, approximate="tanh") * up,
)


def small_model(family, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **options})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits_and_gradients(model):
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    logits.square().mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_compute_the_same(family):
    model = small_model(family)
    expected = logits_and_gradients(model)
    state = torch.get_rng_state()
    applied = apply_kernels(model, KERNELS)
    assert torch.equal(torch.get_rng_state(), state)
    norms = [name for name in applied.layers if name.endswith("RMSNorm")]
    assert norms, applied
    for fused, unfused in zip(logits_and_gradients(model), expected, strict=True):
        assert (fused - unfused).norm() < 1e-5 * unfused.norm()
    gated = {"llama", "qwen3", "gemma2", "gemma3_text", "olmo2"}
    assert any(name.endswith("MLP") for name in applied.layers) == (family in gated)
    attention = any(name.endswith("Attention") for name in applied.layers)
    assert attention == (family != "glm")  # its rotary embedding is interleaved
    if family == "glm":
        assert "differs" in applied.refusal_reasons["GlmAttention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_errors_are_accepted(dtype):
    applied = apply_kernels(small_model("gemma2", dtype), KERNELS)
    assert set(applied.layers) == {"Gemma2RMSNorm", "Gemma2MLP", "Gemma2Attention"}
    assert not applied.refusal_reasons


def test_a_kernel_with_other_results_is_not_used():
    def scaled_rms_norm(x, *args, **kwargs):
        return rms_norm(x, *args, **kwargs) * 1.02

    def broken(*args):
        raise RuntimeError("no code for this card\nsecond line")

    model = small_model("llama")
    expected = logits_and_gradients(model)
    wrong = KERNELS._replace(
        rms_norm=scaled_rms_norm, rotary=broken, swiglu=lambda gate, up: gate * up
    )
    applied = apply_kernels(model, wrong)
    assert not applied.layers
    assert "differs by 0.02" in applied.refusal_reasons["LlamaRMSNorm"]
    assert applied.refusal_reasons["LlamaAttention"] == "RuntimeError: no code for this card"
    assert set(applied.refusal_reasons) == {"LlamaRMSNorm", "LlamaAttention", "LlamaMLP"}
    assert all(
        torch.equal(a, b) for a, b in zip(logits_and_gradients(model), expected, strict=True)
    )


def test_a_kernel_with_other_gradients_is_not_used():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            gate, up = ctx.saved_tensors
            return 1.1 * grad * up, grad * silu(gate)

    applied = apply_kernels(small_model("llama"), KERNELS._replace(swiglu=Scaled.apply))
    assert "differs" in applied.refusal_reasons["LlamaMLP"]


def test_exact_gelu_does_not_use_the_tanh_kernel():
    model = small_model("llama", torch.bfloat16, hidden_act="gelu")  # the kernel computes tanh GELU
    assert "GELUActivation" in apply_kernels(model, KERNELS).refusal_reasons["LlamaMLP"]


def test_running_out_of_memory_is_not_a_refusal():
    def raise_out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        apply_kernels(small_model("llama"), KERNELS._replace(rms_norm=raise_out_of_memory))


def test_on_the_cpu_only_true_is_refused():
    model = small_model("llama")
    assert use_fused_kernels(model, "auto") is None
    assert use_fused_kernels(model, False) is None
    with pytest.raises(ConfigError, match="the model is on cpu") as problem:
        use_fused_kernels(model, True)
    assert problem.value.where == "runtime.fused_kernels"


def pretend_on_gpu(model):
    """The model with a parameter whose device is a GPU: use_fused_kernels reads only the device."""

    class Card:
        device = torch.device("cuda")

    model.parameters = lambda: iter([Card()])
    return model


def test_without_liger_kernel(monkeypatch):
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    model = pretend_on_gpu(small_model("llama"))
    assert "not installed" in use_fused_kernels(model, "auto").refusal_reasons["all layers"]
    with pytest.raises(MissingExtraError, match="liger-kernel is not installed"):
        use_fused_kernels(model, True)


def test_the_kernels_come_from_liger_kernel(monkeypatch):
    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm, functional.liger_rope = KERNELS.rms_norm, KERNELS.rotary
    functional.liger_swiglu, functional.liger_geglu = KERNELS.swiglu, KERNELS.geglu
    transformers.functional = functional
    for module in (package, transformers, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert load_kernels() == KERNELS
    used_kernels = []
    monkeypatch.setattr(
        fused_kernels, "apply_kernels", lambda model, found: used_kernels.append(found)
    )
    use_fused_kernels(pretend_on_gpu(small_model("llama")), "auto")
    assert used_kernels == [KERNELS]
