"""Compute the bytes of a weight, including metadata, in each stored or requested format.

Formats and their sources:

- bitsandbytes NF4 (functional.quantize_4bit): each block of 64 weights has one scale (absmax) in
  float32. With double quantization the scales are uint8, there is one float32 for each 256 blocks,
  and each tensor has 16 + 256 float32 numbers of code tables.
- AutoAWQ GEMM and AutoGPTQ: the tensors qweight (int32), qzeros (int32), scales (float16) and g_idx
  (int32).
- FP8 in the style of compressed-tensors and Transformer Engine: one byte per weight, and scales per
  channel or per block.
- OCP MXFP4: 4 bits per weight and one 8-bit scale per 32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolkit.sizing.config_fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

Method = Literal["bnb-nf4", "bnb-int8", "awq", "gptq", "fp8", "mxfp4", "int8"]
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256
MXFP4_BLOCK = 32


def _ceil_div(count: int, divisor: int) -> int:
    return -(-count // divisor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A weight format. ``skipped_modules`` contains the names, or parts of the names, of modules
    that are not quantized.
    """

    method: Method
    bits: int = 4
    group_size: int = 128  # input weights that share a scale; 0: one scale per output channel
    block_shape: tuple[int, int] | None = None  # (out, in) of FP8 block scales
    nested: bool = False
    skipped_modules: tuple[str, ...] = ()

    def skips(self, name: str) -> bool:
        """Whether the module with this dotted name stays in 16 bits."""
        parts = name.split(".")
        return any(
            fragment == name
            or fragment in parts
            or name.startswith(fragment + ".")
            or f".{fragment}." in f".{name}."
            for fragment in self.skipped_modules
        )

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """The bytes of one (out, in) matrix with its metadata."""
        count = out_features * in_features
        match self.method:
            case "bnb-nf4":
                return _ceil_div(count, 2) + self._absmax_bytes(_ceil_div(count, NF4_BLOCK))
            case "bnb-int8" | "int8":
                return count + 4 * out_features
            case "awq":
                groups = _ceil_div(in_features, self.group_size) if self.group_size > 0 else 1
                packed = _ceil_div(out_features, 32 // self.bits) * 4
                return in_features * packed + groups * packed + groups * out_features * 2
            case "gptq":
                groups = _ceil_div(in_features, self.group_size) if self.group_size > 0 else 1
                qweight = _ceil_div(in_features * self.bits, 32) * out_features * 4
                qzeros = groups * _ceil_div(out_features * self.bits, 32) * 4
                return qweight + qzeros + groups * out_features * 2 + in_features * 4
            case "fp8":
                if self.block_shape is not None:
                    scales = _ceil_div(out_features, self.block_shape[0]) * _ceil_div(
                        in_features, self.block_shape[1]
                    )
                    return count + 4 * scales
                return count + 4 * out_features
            case "mxfp4":
                return _ceil_div(count, 2) + _ceil_div(count, MXFP4_BLOCK)

    def _absmax_bytes(self, blocks: int) -> int:
        if not self.nested:
            return blocks * 4
        return blocks + _ceil_div(blocks, NF4_NESTED_BLOCK) * 4 + 256 * 4 + 16 * 4


NF4_ON_LOAD = Quantization(method="bnb-nf4", skipped_modules=("lm_head", "embed_tokens"))
INT8_ON_LOAD = Quantization(method="bnb-int8", bits=8, skipped_modules=("lm_head", "embed_tokens"))
FP8_ON_LOAD = Quantization(
    method="fp8", bits=8, group_size=0, skipped_modules=("lm_head", "embed_tokens")
)


def parse_quantization(values: Mapping[str, Any] | None, where: str) -> Quantization | str | None:
    """Read the ``quantization_config`` of a config.json.

    Returns None if there is no quantization. Returns the method's name (a string) if the method is
    unknown; the caller then sizes the weights from the safetensors headers.
    """
    if values is None:
        return None
    fields = Fields(values, f"{where}: quantization_config")
    method = fields.text("quant_method") or ""
    skipped = _skipped_modules(fields)
    if method == "bitsandbytes":
        if fields.flag("load_in_8bit", False):
            return Quantization(method="bnb-int8", bits=8, group_size=0, skipped_modules=skipped)
        nested = fields.flag("bnb_4bit_use_double_quant", False)
        return Quantization(method="bnb-nf4", nested=nested, skipped_modules=skipped)
    if method in ("awq", "gptq"):
        bits = fields.integer("bits", "w_bit", default=4, low=2, high=8)
        group = fields.integer("group_size", "q_group_size", default=128, low=-1, high=1 << 20)
        return Quantization(
            method="awq" if method == "awq" else "gptq",
            bits=bits,
            group_size=max(group, 0),
            skipped_modules=skipped,
        )
    if method in ("fp8", "fbgemm_fp8"):
        block = fields.items("weight_block_size", int)
        pair = (block[0], block[1]) if block and len(block) == 2 and min(block) > 0 else None
        return Quantization(
            method="fp8", bits=8, group_size=0, block_shape=pair, skipped_modules=skipped
        )
    if method == "compressed-tensors":
        return _parse_compressed(fields, skipped) or "compressed-tensors"
    if method == "mxfp4":
        return Quantization(method="mxfp4", skipped_modules=skipped)
    return method or "unnamed"


def _parse_compressed(fields: Fields, skipped: tuple[str, ...]) -> Quantization | None:
    """Return the compressed-tensors format if it has exactly one group of layers
    (``config_groups``), and the weights of this group have 8 bits (float or integer). Otherwise
    return None; the size of the weights is then read from the safetensors headers.
    """
    groups = fields.section("config_groups")
    if groups is None or len(groups.values) != 1:
        return None
    group = groups.section(next(iter(groups.values)))
    weights = group.section("weights") if group else None
    if weights is None or weights.integer("num_bits", low=1, high=64) != 8:
        return None
    kind = weights.text("type")
    return Quantization(
        method="fp8" if kind == "float" else "int8", bits=8, group_size=0, skipped_modules=skipped
    )


def _skipped_modules(fields: Fields) -> tuple[str, ...]:
    names: list[str] = []
    for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers"):
        names += [name for name in fields.items(key, str) or () if not name.startswith("re:")]
    # In all these formats, head and embeddings are not quantized unless a checkpoint sets it.
    names += ["lm_head", "embed_tokens"]
    return tuple(dict.fromkeys(name.replace("model.layers.*.", "") for name in names))
