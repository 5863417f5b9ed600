"""Choose values for the arguments of ``from_pretrained`` that are "auto". A run file with the same
``model`` keys gets the same values.

This is the only module of ``policy`` that uses ``toolkit.sizing``, the memory estimate. The
training settings are not known when the model is loaded. So the estimate assumes TRL's default
batch. If the loaded folder contains an adapter, the estimate assumes this adapter. Otherwise it
assumes the default adapter of ``get_peft_model``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ToolkitError
from toolkit.base.process_environment import local_rank, world_size
from toolkit.config.engine_settings import OPTIONS
from toolkit.config.run_config import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.engine.mesh import gather_from_all
from toolkit.gpu import devices
from toolkit.gpu.snapshot import take_snapshot
from toolkit.sizing import Device, fused_shapes, read_spec, resolve_for_all

if TYPE_CHECKING:
    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter

ESTIMATED_OPTIONS = ("gpu_memory_utilization", "tensor_parallel_size")
"""The arguments of ``from_pretrained`` for which the memory estimate replaces "auto"."""

ADAPTER_FIELDS = ("r", "target_modules", "rank_pattern", "exclude_modules", "layers_to_transform")
"""The fields of an adapter's config that determine the adapter's size."""


def resolve_auto_options(
    checkpoint: Checkpoint,
    request: LoadRequest,
    adapter: Adapter | None,
    *,
    length: int,
    dtype: str,
) -> dict[str, Any]:
    """Return the values of the arguments that ``ESTIMATED_OPTIONS`` lists. If ``request`` has
    "auto" for an argument, the memory estimate chooses the value, as for a run file.

    ``length`` is max_seq_length in tokens. ``dtype`` is the name of the weights' dtype. In a run of
    several processes, all processes must call this function, and all get the values for the GPU
    with the least free memory. On a machine without a GPU, ``gpu_memory_utilization`` stays "auto",
    because vLLM uses this option only on a GPU.

    Raises:
        ConfigError: engine and training together need more memory than the GPU has. The message
            lists changes that make them fit.
    """
    options = {name: request.engine[name] for name in ESTIMATED_OPTIONS}
    if "auto" not in options.values():
        return options
    snapshot = take_snapshot()
    gpu = devices.select_device(snapshot, local_rank() if snapshot.gpus else None)
    process_devices = gather_from_all(None if gpu is None else Device.from_node(snapshot, gpu))
    if (
        process_devices.count(None) == len(process_devices)
        and options["tensor_parallel_size"] != "auto"
    ):
        return options
    config = config_for_estimate(checkpoint, request, adapter, length=length, dtype=dtype)
    resolved, _, _ = resolve_for_all(config, process_devices, world_size=world_size())
    return {name: getattr(resolved.model, name) for name in ESTIMATED_OPTIONS}


def slot_shapes(checkpoint: Checkpoint) -> set[tuple[tuple[int, ...], int]]:
    """Return the shapes of the layers that have LoRA slots in the engine (``fused_shapes``). The
    result is empty for an architecture that the memory estimate does not know.
    """
    try:
        return fused_shapes(read_spec(str(checkpoint.folder)))
    except ToolkitError:
        return set()


def config_for_estimate(
    checkpoint: Checkpoint,
    request: LoadRequest,
    adapter: Adapter | None,
    *,
    length: int,
    dtype: str,
) -> RunConfig:
    """Return the run configuration for the memory estimate. It has the model of ``request``, and
    the given length and dtype.
    """
    engine_options = {
        name: request.engine[name] for name in OPTIONS if request.engine[name] is not None
    }
    model_values: dict[str, Any] = {
        **engine_options,
        "model_name": str(checkpoint.folder),
        "max_seq_length": length,
        "dtype": dtype,
        "load_in_4bit": request.load_in_4bit,
        "fast_inference": True,
    }
    return RunConfig(
        model=ModelSection(**model_values),
        lora=lora_section_of(adapter, request.use_gradient_checkpointing),
        runtime=RuntimeSection(engine="vllm"),
    )


def lora_section_of(adapter: Adapter | None, checkpointing: Any = "auto") -> LoraSection:
    """Return the ``lora`` section for the memory estimate. It describes ``adapter``. If ``adapter``
    is None, it describes the default adapter of ``get_peft_model``.
    """
    config = None if adapter is None else adapter.config
    fields = {name: getattr(config, name, None) for name in ADAPTER_FIELDS}
    values: dict[str, Any] = {
        name: tuple(sorted(value)) if isinstance(value, (set, list)) else value
        for name, value in fields.items()
        if value is not None
    }
    return LoraSection(**values, use_gradient_checkpointing=checkpointing)
