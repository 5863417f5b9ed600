"""Resolve "auto" in ``from_pretrained`` to the value that a run file with the same ``model`` keys
gets.

This is the only module of ``policy`` that uses sizing. The training settings are not known when the
model is loaded. So the adapter is that of the folder, else the default one, and the batch is TRL's
default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.process_environment import local_rank, world_size
from toolkit.config.engine_settings import OPTIONS
from toolkit.config.run_config import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.gpu import devices
from toolkit.gpu.snapshot import take
from toolkit.sizing import Device, resolve

if TYPE_CHECKING:
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter

ADAPTER_FIELDS = ("r", "target_modules", "rank_pattern", "exclude_modules", "layers_to_transform")
"""Fields of an adapter's config that determine its size."""


def sized_share(
    checkpoint: Checkpoint,
    request: LoadRequest,
    adapter: Adapter | None,
    *,
    length: int,
    dtype: str,
) -> float | None:
    """The gpu_memory_utilization that the sizer chooses for this process's GPU; None without a GPU.

    ``length`` is max_seq_length in tokens, ``dtype`` the name of the weights' format.

    Raises:
        ConfigError: the run does not fit next to the engine; the message lists changes that make it
            fit.
    """
    snapshot = take()
    gpu = devices.select(snapshot, local_rank() if snapshot.gpus else None)
    if gpu is None:
        return None
    config = as_run(checkpoint, request, adapter, length=length, dtype=dtype)
    resolved, _ = resolve(config, Device.from_node(snapshot, gpu), world_size=world_size())
    share = resolved.model.gpu_memory_utilization
    return None if share == "auto" else share


def as_run(
    checkpoint: Checkpoint,
    request: LoadRequest,
    adapter: Adapter | None,
    *,
    length: int,
    dtype: str,
) -> RunConfig:
    """A run file for the same model, with ``gpu_memory_utilization: auto``."""
    given = {name: request.engine[name] for name in OPTIONS if request.engine[name] is not None}
    model: dict[str, Any] = {
        **given,
        "gpu_memory_utilization": "auto",
        "model_name": str(checkpoint.folder),
        "max_seq_length": length,
        "dtype": dtype,
        "load_in_4bit": request.load_in_4bit,
        "fast_inference": True,
    }
    return RunConfig(
        model=ModelSection(**model),
        lora=lora_of(adapter, request.use_gradient_checkpointing),
        runtime=RuntimeSection(engine="vllm"),
    )


def lora_of(adapter: Adapter | None, checkpointing: Any = "auto") -> LoraSection:
    """The adapter for sizing: the given one, else ``get_peft_model``'s default."""
    config = None if adapter is None else adapter.config
    found = {name: getattr(config, name, None) for name in ADAPTER_FIELDS}
    values: dict[str, Any] = {
        name: tuple(sorted(value)) if isinstance(value, (set, list)) else value
        for name, value in found.items()
        if value is not None
    }
    return LoraSection(**values, use_gradient_checkpointing=checkpointing)
