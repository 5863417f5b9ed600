"""Read the numbers of a run file that determine the memory of the run, and define the plan of a
training step. If the run file does not set a number, the default of TRL 1.16's GRPOConfig is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolkit.sizing import lora_bytes
from toolkit.sizing.micro_batch import TRL_DEFAULTS, read_batch, read_count

if TYPE_CHECKING:
    from toolkit.config.resolved import ResolvedRun
    from toolkit.config.run_config import LoraSection, RunConfig
    from toolkit.sizing.device import Device
    from toolkit.sizing.model_blocks import ModelSpec

# Bytes of optimizer state per trainable parameter (torch.optim, bitsandbytes).
OPTIMIZER_BYTES = {
    "adamw": 8, "adam": 8, "sgd": 0, "adafactor": 0.1, "lion": 4, "rmsprop": 4, "adagrad": 4,
    "adamw_8bit": 2.1, "adamw_bnb_8bit": 2.1, "paged_adamw_8bit": 2.1, "lion_8bit": 1.1,
}  # fmt: skip


Checkpointing = bool | Literal["unsloth"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The numbers of a training step for one process. A micro-batch is the number of rows of one
    forward pass.

    - ``micro_batches``: the possible micro-batches, the largest first. If the run file sets the
      micro-batch, there is only this one.
    - ``micro_batch``: the largest possible micro-batch.
    - ``accumulation``: the gradient accumulation for ``micro_batch``.
    - ``rank``: the largest rank of the adapter in any module.
    - ``base_rank``: the rank of the adapter in all modules to which ``layout.rank_pattern`` gives
      no other rank.
    """

    micro_batch: int
    accumulation: int
    micro_batches: tuple[int, ...]
    rollouts: int
    generations: int
    prompt_tokens: int
    completion_tokens: int
    sequence_tokens: int
    rank: int
    base_rank: int
    targets: tuple[str, ...] | str
    layout: lora_bytes.AdapterLayout
    optimizer: str
    optimizer_bytes: float
    uses_engine: bool
    has_dropout: bool
    has_reference: bool = False  # TRL keeps a copy of the starting adapter for the KL term

    def adapter_parameters(self, spec: ModelSpec) -> int:
        """The number of trainable parameters of the adapter on ``spec``."""
        return lora_bytes.adapter_parameters(spec, self.base_rank, self.targets, self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The settings of a training step.

    - ``pack_tokens``: the maximum number of tokens of a pass over packs (rows joined without
      padding). If it is None, a pass has ``micro_batch`` padded rows.
    - ``passes``: the number of forward and backward passes of a step. If it is None, a step has
      one pass per micro-batch, and ``accumulation`` is their number.
    - ``uses_fused_kernels``: whether the model's layers use the kernels of policy/fused_kernels.
    """

    micro_batch: int
    accumulation: int
    checkpointing: Checkpointing  # True, False, or "unsloth": checkpoints offloaded to the host
    compute_bytes: int
    has_own_weights: bool
    is_quantized: bool = (
        False  # the base model has bitsandbytes layers, with PEFT's layers around them
    )
    world_size: int = 1
    pack_tokens: int | None = None
    passes: int | None = None
    uses_fused_kernels: bool = False
    on_gpu: bool = False

    @property
    def pass_count(self) -> int:
        """The number of passes of a step."""
        return self.accumulation if self.passes is None else self.passes


def max_prompt_length(config: RunConfig) -> int:
    """Return the maximum number of tokens of a prompt: ``grpo.max_prompt_length``, or if it is not
    set, the room that the longest completion leaves in ``model.max_seq_length``.
    """
    length = config.grpo.get("max_prompt_length")
    if isinstance(length, int) and length >= 1:
        return length
    completion = read_count(config.grpo, "max_completion_length")
    return max(config.model.max_seq_length - completion, 1)


def read_workload(run: ResolvedRun, device: Device | None = None) -> Workload:
    """Return the numbers of ``run`` that determine its memory. Raises ConfigError if a number in
    the run file is not an integer of at least 1.
    """
    config, world_size = run.config, run.replicas
    grpo = config.grpo
    completion = read_count(grpo, "max_completion_length")
    length = config.model.max_seq_length
    prompt = max_prompt_length(config)
    sequence = min(prompt + completion, length)
    micro_batches, accumulation, rollouts = read_batch(
        grpo, sequence, on_cpu=device is None, world_size=world_size
    )
    optimizer = str(grpo.get("optim", TRL_DEFAULTS["optim"]))
    return Workload(
        micro_batch=micro_batches[0],
        accumulation=accumulation,
        micro_batches=micro_batches,
        rollouts=rollouts,
        generations=read_count(grpo, "num_generations"),
        prompt_tokens=prompt,
        completion_tokens=completion,
        sequence_tokens=sequence,
        rank=config.lora.largest_rank,
        base_rank=config.lora.r,
        targets=run.targets,
        layout=read_layout(config.lora),
        optimizer=optimizer,
        optimizer_bytes=optimizer_bytes(optimizer),
        uses_engine=run.engine == "vllm",
        has_dropout=config.lora.lora_dropout > 0,
        has_reference=bool(grpo.get("beta", 0.0)) and not config.model.full_finetuning,
    )


def read_layout(section: LoraSection) -> lora_bytes.AdapterLayout:
    """Return the ``lora`` settings that do not apply to all modules equally: the excluded modules,
    the ranks of single modules, and the layers that get the adapter.
    """
    layers = section.layers_to_transform
    return lora_bytes.AdapterLayout(
        exclude=section.exclude_modules,
        rank_pattern=tuple(section.rank_pattern.items()),
        layers=(layers,) if isinstance(layers, int) else layers,
    )


def optimizer_bytes(name: str) -> float:
    """Return the bytes of optimizer state per trainable parameter. An optimizer whose name begins
    with the name of a known optimizer counts as this optimizer. For an unknown optimizer, return 8,
    the bytes of AdamW.
    """
    matching = [key for key in OPTIMIZER_BYTES if name == key or name.startswith(key + "_")]
    if "8bit" in name and not any("8bit" in key for key in matching):
        return 2.1
    return OPTIMIZER_BYTES[max(matching, key=len)] if matching else 8.0
