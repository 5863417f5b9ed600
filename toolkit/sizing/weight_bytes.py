"""Compute the bytes of the weights in the engine and in the trainer's own model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.sizing.model_blocks import DTYPE_BYTES
from toolkit.sizing.weight_formats import FP8_ON_LOAD, INT8_ON_LOAD, NF4_ON_LOAD, Quantization

if TYPE_CHECKING:
    from toolkit.config.run_config import ModelSection
    from toolkit.sizing.model_blocks import Block, Linear, ModelSpec

# vLLM pads the vocabulary of embeddings and head to a multiple of this
# (model_executor/layers/vocab_parallel_embedding.py).
VOCABULARY_PADDING = 64


def padded_vocab(vocab: int) -> int:
    """The number of rows of the embedding in the engine: the vocabulary size, rounded up to a
    multiple of ``VOCABULARY_PADDING``.
    """
    return -(-vocab // VOCABULARY_PADDING) * VOCABULARY_PADDING


def format_on_load(spec: ModelSpec, section: ModelSection) -> Quantization | None:
    """Return the quantization of the weights in memory; None if they are not quantized.

    If the checkpoint is quantized, the result is its quantization. Otherwise it is what
    ``load_in_4bit``, ``load_in_8bit`` or ``load_in_fp8`` requests.
    """
    if spec.quantization is not None:
        return spec.quantization
    if section.load_in_4bit:
        return NF4_ON_LOAD
    if section.load_in_8bit:
        return INT8_ON_LOAD
    return FP8_ON_LOAD if section.load_in_fp8 else None


def weight_bytes(
    spec: ModelSpec, dtype: str, quantization: Quantization | None, *, engine: bool = False
) -> int:
    """The bytes of all weights of the model. With ``engine``, the vocabulary rows that vLLM adds as
    padding are included.
    """
    if spec.sized_by_headers and spec.stored_weights is not None:
        return spec.stored_weights.nbytes
    if engine and quantization is not None and quantization.nested:
        # vLLM's bitsandbytes loader undoes the second quantization of the block scales.
        quantization = replace(quantization, nested=False)
    width = DTYPE_BYTES[dtype]
    vocab = padded_vocab(spec.vocab_size) if engine else spec.vocab_size
    tables = (1 if spec.tied else 2) * vocab * spec.hidden_size
    unquantized = tables + spec.final_vectors + spec.extra_parameters
    unquantized += vocab if spec.head_bias else 0
    total = unquantized * width
    for block in spec.blocks:
        total += block.count * _block_bytes(block, width, quantization)
        if engine and quantization is not None:
            total += block.count * _unpacked_latent_bytes(block, width, quantization)
    return total


def _unpacked_latent_bytes(block: Block, width: int, quantization: Quantization) -> int:
    """The bytes of W_UK and W_UV, the two halves of the weight kv_b_proj in latent attention. If
    kv_b_proj is quantized, vLLM keeps unquantized copies of both halves. Otherwise the halves are
    views of kv_b_proj and need no memory (vllm/model_executor/layers/attention/mla_attention.py).
    """
    return sum(
        linear.weights * width
        for linear in block.linears
        if linear.leaf == "kv_b_proj" and not stays_unquantized(linear, quantization)
    )


def _block_bytes(block: Block, width: int, quantization: Quantization | None) -> int:
    total = block.vectors * width
    for linear in block.linears:
        total += _linear_bytes(linear, width, quantization)
    return total


def _linear_bytes(linear: Linear, width: int, quantization: Quantization | None) -> int:
    biases = linear.copies * linear.out_features * width if linear.bias else 0
    if quantization is None or stays_unquantized(linear, quantization):
        return linear.weights * width + biases
    matrix_bytes = quantization.weight_bytes(linear.out_features, linear.in_features)
    return linear.copies * matrix_bytes + biases


def stays_unquantized(linear: Linear, quantization: Quantization) -> bool:
    """Whether ``linear`` is not quantized. Routers and convolutions stay in 16 bits, and MXFP4
    quantizes only the experts.
    """
    if linear.leaf in ("gate", "router", "shared_expert_gate", "conv1d"):
        return True
    if quantization.method == "mxfp4" and linear.copies == 1:
        return True
    return quantization.skips(linear.name)
