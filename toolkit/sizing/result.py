"""Define the result of sizing: the interval of gpu_memory_utilization, the choice (a value for
every "auto"), the budget of all memory terms, and the run file with every "auto" replaced.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.base.formatting import format_bytes
from toolkit.config.engine_settings import SIZED_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.terms import Term
    from toolkit.sizing.workload import Checkpointing


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """The sizes of the loaded model."""

    name: str
    architecture: str
    parameters: int
    trainable_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    layers: int
    dtype: str
    quantization: str | None
    margin: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePart:
    """The memory of the engine, in bytes.

    - ``lora_bytes``: the LoRA buffers that vLLM allocates by default, with slots (places for
      adapters) in every layer that vLLM can adapt, including experts, embeddings and head.
    - ``lora_slots_bytes``: the LoRA buffers of the toolkit's engine, which requests slots only in
      the projections.
    - ``copies_bytes``: the 16-bit copies of 4-bit weights that exist during rollouts.
    - ``copies_note``: the reason why some weights have no copy; None if all have one.
    - ``ranks``: pairs of a legal max_lora_rank and the bytes of the LoRA buffers with this rank.
    """

    lora_bytes: int
    lora_slots_bytes: int
    activation_bytes: int
    graph_bytes: int
    fixed_bytes: int
    kv_sequence_bytes: int
    kv_wanted_bytes: int
    kv_bytes: int
    copies_bytes: int
    copies_note: str | None
    ranks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPart:
    """The sizes of training on packs (rows merged without padding).

    - ``pack_tokens``: the maximum number of tokens in one pass.
    - ``step_tokens``, ``passes``: the number of tokens and of passes in one step, if every sequence
      has the maximum length.
    - ``passes_half``: the number of passes in one step, if prompts have the maximum length and
      completions have on average half of the maximum length of a completion.
    - ``padded_tokens``: the number of tokens that one step would have without packs, with all rows
      padded to the maximum length.
    """

    pack_tokens: int
    step_tokens: int
    padded_tokens: int
    passes: int
    passes_half: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPart:
    """The memory of the trainer. ``resident_bytes`` are in use all the time, also during rollouts.
    ``step_bytes`` are in use only during a micro-batch.

    ``step_s_estimate`` is the rough time of a training step in seconds, without rollouts. It is
    only used to rank candidates.
    """

    resident_bytes: int
    step_bytes: int
    peak_bytes: int
    step_s_estimate: float
    packs: PackPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The predicted peaks of torch's allocator in each phase and in the whole run, and an upper
    bound that includes margins.
    """

    rollout_bytes: int
    training_bytes: int
    torch_bytes: int
    bound_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The range [min, max] of gpu_memory_utilization. ``binding_min`` and ``binding_max`` name the
    memory term that limits each end. The ends are None without a GPU.
    """

    min: float | None
    max: float | None
    binding_min: str
    binding_max: str
    min_without_margin: float | None = None
    max_without_margin: float | None = None

    @property
    def is_empty(self) -> bool:
        return self.min is not None and self.max is not None and self.min > self.max


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The values that replace every "auto"."""

    gpu_memory_utilization: float | None
    max_lora_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gradient_checkpointing: Checkpointing
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    largest_micro_batch: int
    enable_sleep_mode: bool
    dtype: str
    fast_inference: bool
    kv_cache_bytes: int | None
    dequantized_rollouts: bool | int
    target_modules: tuple[str, ...] | str
    tensor_parallel_size: int = 1
    pack_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of a run, or several combined changes. ``frees_bytes`` is the memory that the change
    frees, ``enough`` says whether the run then fits, and ``costs`` describes its disadvantages.

    Remedies are ordered by ``harm``; 0 means that nothing is lost. ``settings`` are the keys and
    values to set in the run file. ``world_size`` is the number of cards that the change needs
    (None: the number stays the same). ``card`` is the kind of card that it needs (None: the kind
    stays the same).
    """

    change: str
    frees_bytes: int
    enough: bool
    harm: int = 0
    costs: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    world_size: int | None = None
    card: str | None = None

    def __str__(self) -> str:
        costs = f"; {self.costs}" if self.costs else ""
        enough = " (enough)" if self.enough else ""
        return f"{self.change} frees {format_bytes(self.frees_bytes)}{costs}{enough}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingResult:
    """The result of ``solve``. ``budget`` lists every memory term. ``short_bytes`` is the missing
    memory. If ``short_bytes`` is 0 or less, the run fits.
    """

    device: Mapping[str, Any] | None
    model: ModelPart
    engine: EnginePart
    trainer: TrainerPart
    peaks: Peaks
    interval: Interval
    choice: Choice
    terms: tuple[Term, ...]
    remedies: tuple[Remedy, ...] = ()
    short_bytes: int = 0
    longest_sequence: int | None = None

    @property
    def feasible(self) -> bool:
        return self.short_bytes <= 0

    @property
    def budget(self) -> list[dict[str, str | int]]:
        return [term.to_json() for term in self.terms]

    def to_json(self) -> dict[str, Any]:
        """The object that ``envcheck size --json`` prints."""
        engine = asdict(self.engine)
        engine["ranks"] = [
            {"rank": rank, "lora_slots_bytes": nbytes} for rank, nbytes in self.engine.ranks
        ]
        return {
            "feasible": self.feasible,
            "short_bytes": max(0, self.short_bytes),
            "device": dict(self.device) if self.device else None,
            "model": {**asdict(self.model), "notes": list(self.model.notes)},
            "engine": engine,
            "trainer": asdict(self.trainer),
            "peaks": asdict(self.peaks),
            "interval": asdict(self.interval),
            "choice": asdict(self.choice),
            "budget": self.budget,
            "longest_sequence": self.longest_sequence,
            "remedies": [
                {**asdict(remedy), "settings": dict(remedy.settings)} for remedy in self.remedies
            ],
        }

    def infeasible_error(self) -> ConfigError:
        """The error for a run that does not fit. The message says how much memory is missing, what
        needs the most memory, and what limits the memory. The fix lists ``remedies``.
        """
        name = self.device["name"] if self.device else "this host"
        remedy_lines = "\n       ".join(str(remedy) for remedy in self.remedies)
        return ConfigError(
            f"the run does not fit on {name}: {format_bytes(self.short_bytes)} are missing "
            f"(largest need: {self.interval.binding_min}; limit: {self.interval.binding_max})"
            + self.length_advice,
            where="gpu_memory_utilization",
            fix=remedy_lines or "use a card with more memory",
        )

    @property
    def length_advice(self) -> str:
        """The end of the error message for a run that does not fit. It says that even a single
        sequence of the full length does not fit, and names a length that fits. The text is empty if
        ``longest_sequence`` is None.
        """
        if self.longest_sequence is None:
            return ""
        if self.longest_sequence == 0:
            return "; not even a short sequence fits by itself"
        return (
            "; a single sequence of model.max_seq_length does not fit, but a sequence of"
            f" {self.longest_sequence:,} tokens (prompt and completion) fits"
        )

    def utilization_error(self, config: RunConfig) -> ConfigError | None:
        """Return an error if gpu_memory_utilization in the run file is outside the interval that is
        possible for this run. The interval is computed without safety margins. Return None in
        all other cases, also for the value "auto".
        """
        configured, interval = config.model.gpu_memory_utilization, self.interval
        low, high = interval.min_without_margin, interval.max_without_margin
        if configured == "auto" or low is None or high is None or low <= configured <= high:
            return None
        bound, limiting_term = (
            (f"below {low}, the minimum", interval.binding_min)
            if configured < low
            else (f"above {high}, the maximum", interval.binding_max)
        )
        return ConfigError(
            f"{configured} is {bound} for this run on this device (limited by: {limiting_term})",
            where="model.gpu_memory_utilization",
            fix=f"set gpu_memory_utilization to a value from {interval.min} to {interval.max}, "
            "or to auto",
        )

    def apply(self, config: RunConfig) -> RunConfig:
        """Return ``config`` with every "auto" replaced. Raises ConfigError if the run does not fit.

        Without a GPU, gpu_memory_utilization stays "auto", because it has no effect.
        """
        if not self.feasible:
            raise self.infeasible_error()
        if problem := self.utilization_error(config):
            raise problem
        choice = self.choice
        model = config.model
        model_values: dict[str, Any] = {
            name: getattr(choice, name)
            for name in (*SIZED_OPTIONS, "fast_inference", "dtype")
            if getattr(model, name) == "auto" and getattr(choice, name) is not None
        }
        if model.kv_cache_bytes == "auto":
            model_values["kv_cache_bytes"] = choice.kv_cache_bytes
        lora = config.lora
        if lora.use_gradient_checkpointing == "auto":
            lora = replace(lora, use_gradient_checkpointing=choice.gradient_checkpointing)
        if lora.target_modules == "auto":
            lora = replace(lora, target_modules=choice.target_modules)
        runtime = config.runtime
        if runtime.pack_tokens == "auto" and choice.pack_tokens is not None:
            runtime = replace(runtime, pack_tokens=choice.pack_tokens)
        grpo = {
            key: getattr(choice, key) if value == "auto" and hasattr(choice, key) else value
            for key, value in config.grpo.items()
        }
        return replace(
            config,
            model=replace(model, **model_values),
            lora=lora,
            grpo=MappingProxyType(grpo),
            runtime=runtime,
        )
