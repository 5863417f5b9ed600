"""Compute attention over a packed sequence (a pack). A pack is one row with many completions,
without padding, and with only one copy of each prompt.

A pack consists of *segments*. A segment is a series of consecutive tokens, such as a completion. It
attends causally to itself, and to all tokens of its *prefix*. The prefix is another segment of the
pack (the prompt), or is empty. So the completions of a group share one copy of their prompt, and no
mask over the whole pack is needed.

``packed_attention`` is registered with transformers' public ``AttentionInterface``. If the keyword
``packed_layout`` is not passed, there is no pack, and ``packed_attention`` calls the model's own
attention function. For a pack on a GPU in half precision, ``packed_attention`` uses
``torch.nn.attention.varlen`` (FlashAttention-2). In other cases, and for models with a soft cap or
attention sinks, it splits the segments into batches of similar length and calls the model's own
attention function for each batch.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LAYOUT_KEYWORD = "packed_layout"
"""The keyword of the model's ``forward`` that passes a ``PackedLayout`` to the attention function.
"""
NAME_PREFIX = "packed_"
"""The prefix of the registered names. For example, ``packed_sdpa`` is packed attention for a model
that uses ``sdpa``.
"""
SUPPORTED_FUNCTIONS = ("sdpa", "eager")
"""The attention functions that packed attention supports."""

_MAX_SCORES = 1 << 26  # maximum query-key pairs per head in one call of the model's own function
_SUM_ELEMENTS = 1 << 24  # largest float32 copy of gradients of keys, in elements (64 MiB)
_MAX_PADDING_RATIO = 1.25  # maximum ratio of the padded size of a batch to its real size
_ACCEPTS_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
_varlen_kernel: Callable[..., Any] = (
    partial(varlen_attn, enable_gqa=True) if _ACCEPTS_ENABLE_GQA else varlen_attn
)
"""torch's attention kernel. torch 2.11 accepts fewer key heads than query heads by default, and
2.13 needs ``enable_gqa`` for that.
"""


class Segment(NamedTuple):
    """The tokens from ``start`` to ``start + length`` of the pack. These tokens also attend to the
    tokens of the segment's prefix, from ``prefix_start`` to ``prefix_start + prefix_length``.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def keys(self) -> int:
        """The number of tokens that the segment's last token attends to."""
        return self.prefix_length + self.length


class Batch(NamedTuple):
    """Blocks of queries for one call of the model's own attention function. The blocks come from
    segments of similar size, and are padded to the same size.
    """

    queries_ST: torch.Tensor  # indices into the pack; padding repeats a real token
    keys_SK: torch.Tensor
    positions_ST: torch.Tensor  # position of each query among its segment's keys; -1 is padding
    key_counts_S: torch.Tensor


@dataclass(eq=False)
class PackedLayout:
    """The segments of a pack, and the index tensors that attention needs for them. All tensors are
    on ``device``.
    """

    segments: Sequence[Segment]
    device: torch.device
    tokens: int = field(init=False)
    windows: dict[int, int | None] = field(default_factory=dict, init=False)
    """The sliding window that each attention module used, by the module's ``id()``."""
    _batches: list[Batch] | None = field(default=None, init=False)
    _output_position_N: torch.Tensor | None = field(default=None, init=False)
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.segments = [segment for segment in self.segments if segment.length]
        self.tokens = sum(segment.length for segment in self.segments)
        self.max_queries = max(segment.length for segment in self.segments)
        self.max_keys = max(segment.keys for segment in self.segments)
        self.query_ends = self._cumulative_ends([segment.length for segment in self.segments])
        self.key_ends = self._cumulative_ends([segment.keys for segment in self.segments])
        self.key_index, self.key_order, self.key_counts = self._key_index()

    def _cumulative_ends(self, lengths: Sequence[int]) -> torch.Tensor:
        """Return 0 and the cumulative sums of ``lengths`` as int32, as the kernel needs them."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device)

    def _key_index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return an index (K,) of the keys of all segments. Also return two tensors for the
        backward pass: the order (K,) that sorts the index, and the counts (N,).

        Each entry of the index is the position of a key in the pack. The keys of the first segment
        come first, then the keys of the second segment, and so on. A token of a shared prefix
        occurs once for each segment with this prefix. The counts say how often each token of the
        pack occurs in the index.
        """
        parts = [
            torch.arange(first, first + size)
            for start, length, prefix_start, prefix_length in self.segments
            for first, size in ((prefix_start, prefix_length), (start, length))
        ]
        index_K = torch.cat(parts)
        order_K = index_K.argsort(stable=True)
        counts_N = torch.bincount(index_K, minlength=self.tokens)
        return index_K.to(self.device), order_K.to(self.device), counts_N.to(self.device)

    @property
    def batches(self) -> list[Batch]:
        """The queries of all segments of the pack, grouped into batches. The model's own attention
        function is called once per batch.
        """
        if self._batches is None:
            blocks = list(self._query_blocks())
            self._batches = [self._make_batch(group) for group in _group_blocks(blocks)]
            real_queries = [batch.queries_ST[batch.positions_ST >= 0] for batch in self._batches]
            order = torch.cat(real_queries).argsort()
            is_real = torch.cat([(b.positions_ST >= 0).flatten() for b in self._batches])
            self._output_position_N = is_real.nonzero().flatten()[order]
        return self._batches

    @property
    def output_position_N(self) -> torch.Tensor:  # noqa: N802 - a tensor with its shape
        """For each of the N tokens of the pack, the position of the token's output in the
        concatenated outputs of all ``batches``. These outputs include padding.
        """
        assert self.batches
        assert self._output_position_N is not None
        return self._output_position_N

    def _query_blocks(self) -> list[tuple[Segment, int, int]]:
        """Return each block of queries as (segment, first, end). The block has the segment's
        queries from ``first`` to ``end``. A long segment is split into several blocks.
        """
        blocks = []
        for segment in self.segments:
            step = max(1, _MAX_SCORES // segment.keys)
            for first in range(0, segment.length, step):
                blocks.append((segment, first, min(first + step, segment.length)))
        return blocks

    def _make_batch(self, blocks: Sequence[tuple[Segment, int, int]]) -> Batch:
        rows = max(end - first for _, first, end in blocks)
        columns = max(segment.prefix_length + end for segment, _, end in blocks)
        queries = torch.zeros(len(blocks), rows, dtype=torch.long)
        positions = torch.full((len(blocks), rows), -1)
        keys = torch.zeros(len(blocks), columns, dtype=torch.long)
        counts = torch.zeros(len(blocks), dtype=torch.long)
        for row, (segment, first, end) in enumerate(blocks):
            start, _, prefix_start, prefix_length = segment
            queries[row] = start + first
            queries[row, : end - first] = torch.arange(start + first, start + end)
            positions[row, : end - first] = torch.arange(prefix_length + first, prefix_length + end)
            keys[row] = start
            keys[row, :prefix_length] = torch.arange(prefix_start, prefix_start + prefix_length)
            keys[row, prefix_length : prefix_length + end] = torch.arange(start, start + end)
            counts[row] = prefix_length + end
        return Batch(*(x.to(self.device) for x in (queries, keys, positions, counts)))

    def mask(self, batch_index: int, window: int | None) -> torch.Tensor:
        """Return the mask of the batch ``batch_index``, (S, 1, T, K), for S blocks of T queries
        with K keys. An entry is True if the query attends to the key. ``window`` is the number of
        tokens that a token attends to, including itself (None means no limit).
        """
        cached_mask = self._masks.get((batch_index, window))
        if cached_mask is not None:
            return cached_mask
        _, keys_SK, positions_ST, counts_S = self.batches[batch_index]
        key_K = torch.arange(keys_SK.shape[1], device=self.device)
        position_ST1 = positions_ST.clamp(min=0).unsqueeze(-1)
        mask = (key_K <= position_ST1) & (key_K < counts_S[:, None, None])
        if window is not None:
            mask &= key_K > position_ST1 - window
        self._masks[batch_index, window] = mask.unsqueeze(1)
        return self._masks[batch_index, window]


def _group_blocks(
    blocks: Sequence[tuple[Segment, int, int]],
) -> list[list[tuple[Segment, int, int]]]:
    """Put blocks of similar size into groups. ``_make_batch`` later pads the blocks of a group to
    the size of the largest block in the group. So this padding stays small.
    """
    groups: list[list[tuple[Segment, int, int]]] = []
    real_size = 0

    def size(block: tuple[Segment, int, int]) -> tuple[int, int]:
        segment, first, end = block
        return segment.prefix_length + end, end - first

    for block in sorted(blocks, key=size, reverse=True):
        area = size(block)[0] * size(block)[1]
        if groups:
            group = [*groups[-1], block]
            padded_size = (
                max(size(b)[0] for b in group) * max(size(b)[1] for b in group) * len(group)
            )
            if padded_size <= min(_MAX_SCORES, _MAX_PADDING_RATIO * (real_size + area)):
                groups[-1].append(block)
                real_size += area
                continue
        groups.append([block])
        real_size = area
    return groups


class _GatherKeys(torch.autograd.Function):
    """Computes ``x_NHD[key_index]``. The backward pass adds the gradients in a fixed order and in
    float32.

    torch's own gradient of indexing uses atomic additions on a GPU. Their order varies between
    runs, and so do the last bits of the result. Each addition also rounds to the dtype of ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x_NHD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return x_NHD.index_select(0, layout.key_index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient_KHD,) = gradients
        layout: PackedLayout = ctx.layout
        heads = max(1, _SUM_ELEMENTS // gradient_KHD[:, 0].numel())
        sums = [
            torch.segment_reduce(
                part_KHD.index_select(0, layout.key_order).float(),
                "sum",
                lengths=layout.key_counts,
                axis=0,
                unsafe=True,  # the lengths are correct, and checking them would wait for the GPU
            ).to(gradient_KHD.dtype)
            for part_KHD in torch.split(gradient_KHD, heads, dim=1)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1), None


def _kernel_attention(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: PackedLayout,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute attention (N, H, D) with the kernel ``varlen_attn``. The keys and values are copied
    first, because the kernel needs the keys and values of each segment in contiguous memory.
    """
    query_NHD, key_NHD, value_NHD = states
    output: torch.Tensor = _varlen_kernel(
        query_NHD,
        gather_keys(key_NHD, layout),
        gather_keys(value_NHD, layout),
        layout.query_ends,
        layout.key_ends,
        layout.max_queries,
        layout.max_keys,
        scale=scale,
        # The kernel's window is the number of tokens before the query. The 0 makes the mask causal,
        # and the kernel aligns it to the last key.
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output


def gather_keys(x_NHD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Return the keys (or values) of all segments (K, H, D), one segment after another. ``x_NHD``
    are the keys (or values) of the tokens of the pack.

    Several segments can attend to the same token, for example of a shared prompt. The gradients
    from these segments are added in a fixed order, in float32.
    """
    gathered: torch.Tensor = _GatherKeys.apply(x_NHD, layout)  # type: ignore[no-untyped-call]  # torch's own
    return gathered


def _batched_attention(
    attention_function: Callable[..., Any],
    module: torch.nn.Module,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: PackedLayout,
    needs_additive_mask: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute attention (1, N, H, D) with the model's own function, one batch of segments after
    another.
    """
    query_NHD, key_NHD, value_NHD = states
    outputs = []
    for batch_index, batch in enumerate(layout.batches):
        mask = layout.mask(batch_index, kwargs.get("sliding_window"))
        if needs_additive_mask:
            zero = query_NHD.new_zeros(())
            mask = torch.where(mask, zero, torch.finfo(zero.dtype).min)
        output, _ = attention_function(
            module,
            query_NHD[batch.queries_ST].transpose(1, 2),
            _gather_batch(key_NHD, batch.keys_SK).transpose(1, 2),
            _gather_batch(value_NHD, batch.keys_SK).transpose(1, 2),
            mask,
            **kwargs,
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.output_position_N).unsqueeze(0)


def _gather_batch(x_NHD: torch.Tensor, index_SK: torch.Tensor) -> torch.Tensor:
    gathered = x_NHD.index_select(0, index_SK.flatten())
    return gathered.view(*index_SK.shape, *x_NHD.shape[1:])


def can_use_kernel(query: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Return True if ``varlen_attn`` supports this layer's attention on this device."""
    is_half_precision = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    is_plain = all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    has_equal_sizes = query.shape[-1] == value.shape[-1] <= 256
    return is_half_precision and is_plain and has_equal_sizes and not kwargs.get("dropout")


def packed_attention(
    function_name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Compute attention with transformers' attention function ``function_name``, such as "sdpa". If
    the keyword ``packed_layout`` is passed, the inputs are a pack, and the result is the attention
    over this pack.

    ``query`` has the shape (B, H, T, D). Returns the output (B, T, H, D) and the attention weights
    (None for a pack).
    """
    layout: PackedLayout | None = kwargs.pop(LAYOUT_KEYWORD, None)
    eager_function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(function_name, eager_function)
    if layout is None:
        result: tuple[torch.Tensor, Any] = function(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    layout.windows[id(module)] = kwargs.get("sliding_window")
    query_NHD, key_NHD, value_NHD = (x.transpose(1, 2)[0] for x in (query, key, value))
    states = (query_NHD, key_NHD, value_NHD)
    if can_use_kernel(query, value, kwargs):
        scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
        output = _kernel_attention(states, layout, scale, window).unsqueeze(0)
    else:
        output = _batched_attention(
            function, module, states, layout, needs_additive_mask=function_name == "eager", **kwargs
        )
    return output, None


def register_packed_attention() -> None:
    """Register packed attention with transformers, once for each attention function in
    ``SUPPORTED_FUNCTIONS``. The masks are made by transformers' mask function for the same
    attention function.
    """
    for function_name in SUPPORTED_FUNCTIONS:
        AttentionInterface.register(
            NAME_PREFIX + function_name, partial(packed_attention, function_name)
        )
        AttentionMaskInterface.register(
            NAME_PREFIX + function_name, ALL_MASK_ATTENTION_FUNCTIONS[function_name]
        )
