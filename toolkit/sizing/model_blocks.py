"""Describe the parts of a model that matter for its memory: blocks of linear maps, other parameters
(vectors), and the KV cache of each block.

Parameters, bytes of quantized weights, KV bytes, LoRA buffers and activations are all computed from
this description. So a test of one of these numbers also checks the description that the other
numbers use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from toolkit.config.run_config import SEVEN_PROJECTIONS

if TYPE_CHECKING:
    from toolkit.sizing.headers import StoredWeights
    from toolkit.sizing.weight_formats import Quantization

AttentionKind = Literal["full", "sliding", "mla", "linear", "none"]
# How the trainer computes attention scores. A fused kernel saves no scores. "eager" saves one
# matrix per head. "capped" (soft-capping, which Hugging Face's fused default ignores) saves one
# more matrix.
Scores = Literal["fused", "eager", "capped"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear map, or several of the same shape (such as the routed experts of a layer).

    ``copies`` is the number of matrices. Each matrix has ``out_features`` rows and ``in_features``
    columns. If ``bias`` is true, each matrix has a bias with ``out_features`` elements. ``name`` is
    the dotted name inside the block, as Hugging Face names it.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    copies: int = 1

    @property
    def leaf(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        return self.copies * self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        return self.weights + (self.copies * self.out_features if self.bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The cache of each layer of a block. Layers of the kinds full, sliding and mla have keys and
    values for each token. Layers of the kind linear have one state per sequence. Sizes are numbers
    of elements.
    """

    kind: AttentionKind
    key_elements: int = 0  # per token, all KV heads
    value_elements: int = 0
    window: int | None = None  # in tokens; None = unlimited
    state_elements: int = 0  # per sequence, only for linear attention


@dataclass(frozen=True, slots=True)
class RopeTable:
    """A table with the cosines and sines of ``rows`` positions. Each position has ``columns``
    numbers. The numbers are float32 if ``float32`` is true; otherwise they have the dtype of the
    engine.
    """

    rows: int
    columns: int
    float32: bool = False

    def nbytes(self, element_bytes: int) -> int:
        return self.rows * self.columns * (4 if self.float32 else element_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A group of ``count`` identical layers. ``vectors`` is the number of parameters outside linear
    maps (norms, sinks, convolutions).
    """

    count: int
    linears: tuple[Linear, ...]
    vectors: int
    cache: Cache
    active_experts: int = 0

    def active_copies(self, linear: Linear) -> int:
        """The number of copies (matrices) of ``linear`` that are applied to one token."""
        return self.active_experts if linear.copies > 1 else 1

    @property
    def parameters(self) -> int:
        return self.count * (sum(linear.parameters for linear in self.linears) + self.vectors)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as config.json (and the safetensors headers, if present) describes it."""

    name: str
    architecture: str
    family: str
    hidden_size: int
    vocab_size: int
    heads: int
    head_dim: int
    max_position: int
    dtype: str
    tied: bool
    blocks: tuple[Block, ...]
    final_vectors: int
    extra_parameters: int = 0  # those of a vision tower and its projector
    head_bias: bool = False
    quantization: Quantization | None = None
    stored_weights: StoredWeights | None = None
    sized_by_headers: bool = False  # True: weights are as large as the files
    margin: float = 0.0  # added to weight and KV terms; 0 for a known architecture
    lora_tables: tuple[str, ...] = ()  # embedding and head, if they have LoRA slots in the engine
    rope_tables: tuple[RopeTable, ...] = ()
    scores: Scores = "fused"
    targets: tuple[str, ...] = SEVEN_PROJECTIONS  # the value of lora.target_modules for "auto"
    notes: tuple[str, ...] = field(default=())

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

    @property
    def parameters(self) -> int:
        """The number of parameters; a tied head counts only as the embedding."""
        embeddings = self.vocab_size * self.hidden_size
        head = 0 if self.tied else embeddings
        bias = self.vocab_size if self.head_bias else 0
        return (
            embeddings
            + head
            + bias
            + self.final_vectors
            + self.extra_parameters
            + sum(block.parameters for block in self.blocks)
        )
