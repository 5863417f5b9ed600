"""liger-kernel's functions, and the name under which transformers calls its rotary function."""

import inspect

import pytest

from toolkit.policy import fused_kernels

pytestmark = pytest.mark.contract


def test_the_kernels_accept_the_arguments_that_we_pass():
    pytest.importorskip("liger_kernel", reason="liger-kernel comes with the cuda extra")
    kernels = fused_kernels.load_kernels()
    assert kernels is not None
    inspect.signature(kernels.rms_norm).bind(
        "x", "weight", 1e-6, offset=0.0, casting_mode="llama", in_place=False
    )
    inspect.signature(kernels.rotary).bind("q", "k", "cos", "sin")
    inspect.signature(kernels.swiglu).bind("gate", "up")
    inspect.signature(kernels.geglu).bind("gate", "up")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_attention_calls_the_rotary_function_by_its_name(family):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    attention = next(
        value
        for name, value in vars(module).items()
        if name.endswith("Attention") and isinstance(value, type)
    )
    assert fused_kernels.ROTARY_FUNCTION in attention.forward.__code__.co_names
    arguments = ["q", "k", "cos", "sin"]
    assert list(inspect.signature(module.apply_rotary_pos_emb).parameters)[:4] == arguments
