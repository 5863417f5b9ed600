"""The keys of a pack, and the gradient of a prompt that several completions share."""

from __future__ import annotations

import pytest
import torch

from toolkit.policy.packed_attention import PackedLayout, Segment, gather_keys


def make_layout(prompt: int, completions: list[int]) -> PackedLayout:
    """A pack with one prompt and completions of these lengths, in tokens."""
    segments, start = [Segment(0, prompt)], prompt
    for length in completions:
        segments.append(Segment(start, length, 0, prompt))
        start += length
    return PackedLayout(segments, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("prompt", "completions"),
    [
        (5, [3, 0, 1, 4]),
        (8192, [1] * 8),  # so long that the sums are computed for a few heads at a time
    ],
)
def test_the_gradient_of_a_shared_token_is_summed_over_the_segments(
    prompt: int, completions: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layout = make_layout(prompt, completions)
    x = torch.randn(layout.tokens, 4, 64).to(dtype).requires_grad_()
    keys = gather_keys(x, layout)
    assert torch.equal(keys, x[layout.key_index])
    uses = torch.bincount(layout.key_index, minlength=layout.tokens)
    assert int(uses[0]) == 1 + sum(length > 0 for length in completions)
    gradient = torch.randn(keys.shape).to(dtype)
    keys.backward(gradient)
    expected = torch.zeros(x.shape, dtype=torch.float32)
    expected.index_add_(0, layout.key_index, gradient.float())
    torch.testing.assert_close(
        x.grad, expected.to(dtype), rtol=1e-5 if dtype.itemsize == 4 else 0.01, atol=1e-5
    )
    first_gradient = x.grad.clone()
    x.grad = None
    gather_keys(x, layout).backward(gradient)
    assert torch.equal(x.grad, first_gradient)
