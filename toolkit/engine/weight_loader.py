"""Define the toolkit's model loader, which is registered with vLLM's ``register_model_loader``.

The loader reads checkpoints as vLLM's default loader does, and in addition:

* On a CPU it makes each linear layer keep its weight as loaded. By default vLLM repacks the
  weight for its matrix kernel and drops the original, which the trainer then could not share
  (``_cpu_skip_gemm_dispatch``, vLLM 0.31.0). On CUDA vLLM does not repack the weights.
* It records the name of every tensor that it read. ``policy.shared_weights`` uses these names to
  reject a checkpoint with a tensor that belongs to no parameter of the model.
* It compiles vLLM's LoRA kernels while it reads (``engine.lora_compile``).
* It records a few loaded values of each parameter. They show which parameters vLLM later rewrites
  for a kernel (experts on a CPU). Rewritten parameters cannot be shared.

For 4-bit models vLLM always chooses its own loader. ``register_dequantizing`` replaces that loader
by a loader that compiles the LoRA kernels too, and whose layers can compute with 16-bit copies
(``engine.dequantized``).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from toolkit.base.mapped_files import copy_mapped_weights
from toolkit.engine import dequantized
from toolkit.engine.engine_options import LOAD_FORMAT
from toolkit.engine.live_weights import (
    LOADED_SAMPLES_ATTRIBUTE,
    READ_NAMES_ATTRIBUTE,
    plain_parameters,
    sample_values,
)
from toolkit.engine.lora_compile import compiled_lora_kernels

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig


class CompilesLoraKernels:
    """A base class for loaders, placed before vLLM's loader. The LoRA kernels are compiled while
    ``load_weights`` of the other classes reads the checkpoint.
    """

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, *arguments: Any, **keywords: Any
    ) -> nn.Module:
        """Make the model and read the checkpoint."""
        self._vllm_config = vllm_config
        loader: Any = super()
        model: nn.Module = loader.load_model(vllm_config, model_config, *arguments, **keywords)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Read the checkpoint into ``model``."""
        loader: Any = super()
        with compiled_lora_kernels(model, self._vllm_config):
            loader.load_weights(model, model_config)


class SharedWeightsLoader(CompilesLoraKernels, DefaultModelLoader):  # type: ignore[misc]  # vllm ships no types
    """vLLM's default loader, changed so that a second model can share the loaded weights."""

    def __init__(self, load_config: LoadConfig) -> None:
        load_config.load_format = "auto"
        super().__init__(load_config)
        self._read_names: set[str] = set()

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Read the checkpoint into ``model``."""
        for module in model.modules():
            if isinstance(module, LinearBase):
                module._cpu_skip_gemm_dispatch = True
        super().load_weights(model, model_config)
        copy_mapped_weights(model)
        setattr(model, READ_NAMES_ATTRIBUTE, frozenset(self._read_names))
        samples = {name: sample_values(tensor) for name, tensor in plain_parameters(model).items()}
        setattr(model, LOADED_SAMPLES_ATTRIBUTE, samples)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield every (name, tensor) of the checkpoint and record the names."""
        for name, tensor in super().get_all_weights(model_config, model):
            self._read_names.add(name)
            yield name, tensor


def register() -> None:
    """Register the loader in vLLM under the name ``engine_options.LOAD_FORMAT``. A second call has
    no effect.
    """
    register_model_loader(LOAD_FORMAT)(SharedWeightsLoader)


BNB_LOAD_FORMAT = "bitsandbytes"
"""The name of vLLM's loader for 4-bit weights. vLLM chooses this loader itself."""
COPIES_OPTION = "dequantized_rollouts"
"""The key of ``model_loader_extra_config`` that sets which layers get 16-bit copies. Its value is
True for all layers, a number of bytes, or "auto".
"""


def register_dequantizing() -> None:
    """Replace vLLM's loader of 4-bit models by the subclass that ``make_dequantizing_loader``
    returns. Does nothing on a second call, or if this version of vLLM does not have this loader
    (0.31 moved it).
    """
    module = "vllm.model_executor.model_loader"
    if find_spec(f"{module}.bitsandbytes_loader") is None:
        return
    from vllm.model_executor import model_loader  # noqa: PLC0415
    from vllm.model_executor.model_loader.bitsandbytes_loader import (  # noqa: PLC0415
        BitsAndBytesModelLoader,
    )

    registered: Any = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    if registered.get(BNB_LOAD_FORMAT) is BitsAndBytesModelLoader:
        register_model_loader(BNB_LOAD_FORMAT)(make_dequantizing_loader(BitsAndBytesModelLoader))


def make_dequantizing_loader(loader: type[Any], **options: Any) -> type[Any]:
    """Return a subclass of ``loader``, which is vLLM's loader of 4-bit models. If
    ``model_loader_extra_config`` requests 16-bit copies of the weights, the subclass attaches them
    to the layers. ``options`` are passed to ``dequantized.attach_copies``.
    """

    class DequantizingLoader(CompilesLoraKernels, loader):  # type: ignore[misc]  # known only at run time
        def load_model(
            self,
            vllm_config: VllmConfig,
            model_config: ModelConfig,
            *arguments: Any,
            **keywords: Any,
        ) -> nn.Module:
            """Load the model with ``loader``. If 16-bit copies of the weights are requested, attach
            them to the layers. The copies stay empty until the first forward pass.
            """
            model = super().load_model(vllm_config, model_config, *arguments, **keywords)
            requested = (self.load_config.model_loader_extra_config or {}).get(COPIES_OPTION, False)
            if requested == "auto":
                requested = dequantized.choose_copy_bytes(model, vllm_config)
            if requested and (copies := dequantized.attach_copies(model, requested, **options)):
                copies.check_fits()
            return model

    return DequantizingLoader
