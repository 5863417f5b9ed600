"""A 4-bit quantization that vLLM's CPU engine can run, registered by vLLM's public functions. The
codes have the layout of vLLM's bitsandbytes layers (``engine.live_weights.is_packed``), and every
call dequantizes them, as bitsandbytes does on a GPU.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from vllm import LLM
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from toolkit.engine.engine import Engine
from toolkit.engine.open_engine import prepare_environment
from toolkit.engine.weight_loader import COPIES_OPTION, make_dequantizing_loader

if TYPE_CHECKING:
    from toolkit.engine.engine_options import EngineOptions

NAME = "toolkit_stand_in_4bit"
BLOCK = 32
CODE = torch.linspace(-1, 1, 16)
calls = {"unpacked": 0}


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(codes (n, 1) uint8, state) of a (rows, columns) weight."""
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1).clamp(min=1e-8)
    code_distances = (blocks / absmax[:, None])[..., None] - CODE
    indices = code_distances.abs().argmin(-1).reshape(-1, 2).to(torch.uint8)
    state = SimpleNamespace(shape=weight.shape, absmax=absmax, dtype=weight.dtype, nested=False)
    return (indices[:, 0] * 16 + indices[:, 1])[:, None], state


def unpack(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """The reverse of ``pack``, into ``out``."""
    calls["unpacked"] += 1
    indices = torch.cat([packed // 16, packed % 16], 1).reshape(-1).long()
    values = CODE[indices].reshape(-1, BLOCK) * state.absmax[:, None]
    out.copy_(values.reshape(tuple(state.shape)))


class StandInMethod(LinearMethodBase):
    """Loads 32-bit weights, keeps 4-bit codes, and dequantizes at every product."""

    def create_weights(self, layer: Any, *arguments: Any, **keywords: Any) -> None:
        UnquantizedLinearMethod().create_weights(layer, *arguments, **keywords)

    def process_weights_after_loading(self, layer: Any) -> None:
        sizes = getattr(layer, "output_sizes", None) or [layer.weight.shape[0]]
        parts = [pack(part) for part in layer.weight.data.split(list(sizes))]
        packed = torch.nn.Parameter(torch.cat([codes for codes, _ in parts]), requires_grad=False)
        packed.bnb_quant_state = {i: state for i, (_, state) in enumerate(parts)}
        ends = torch.tensor([0, *(len(codes) for codes, _ in parts)]).cumsum(0)
        packed.bnb_shard_offsets = ends
        layer.weight = packed

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        packed, parts = layer.weight, []
        for index, state in packed.bnb_quant_state.items():
            start, end = (int(packed.bnb_shard_offsets[index + step]) for step in (0, 1))
            parts.append(torch.empty(tuple(state.shape)))
            unpack(packed.data[start:end], state, parts[-1])
        out = functional.linear(x, torch.cat(parts))
        return out if bias is None else out + bias


class StandInConfig(QuantizationConfig):
    """Every linear layer is packed."""

    @classmethod
    def get_name(cls) -> Any:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StandInConfig:
        del config
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        del prefix
        return StandInMethod() if isinstance(layer, LinearBase) else None


class StandInLoader(DefaultModelLoader):
    """vLLM's default loader, which would refuse the toolkit's key in ``model_loader_extra_config``:
    the key is hidden from its constructor.
    """

    def __init__(self, load_config: Any) -> None:
        extra_config, load_config.load_format = load_config.model_loader_extra_config, "auto"
        load_config.model_loader_extra_config = {}
        super().__init__(load_config)
        load_config.model_loader_extra_config = extra_config


def open_packed_engine(options: EngineOptions, copies: bool | int) -> Engine:
    """An engine over packed weights. ``copies``: True for copies of all layers, False for none, or
    the number of bytes that the copies may use.
    """
    prepare_environment()
    register_quantization_config(NAME)(StandInConfig)
    loader = make_dequantizing_loader(StandInLoader, unpack=unpack, dtype=torch.float32)
    register_model_loader(NAME)(loader)
    arguments = options.to_vllm("cpu") | {
        "quantization": NAME,
        "load_format": NAME,
        "model_loader_extra_config": {COPIES_OPTION: copies},
        "enable_chunked_prefill": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own warnings
        return Engine(LLM(**arguments), options, owns_process_group=True)
