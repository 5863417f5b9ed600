"""Define the frozen dataclasses of a validated run file.

The trainer gets a ``RunConfig``, so the run file is parsed only once. A value can still be
``"auto"``. ``toolkit.sizing`` later replaces "auto" by a number, and the run's config.json contains
that number. Names and defaults are those of the drop-in API, of PEFT and of TRL's GRPOConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from toolkit.config.engine_settings import Auto, EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection(EngineSettings):
    """The model to load, and the settings of its vLLM engine."""

    model_name: str
    max_seq_length: int = 2048
    dtype: Dtype = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    load_in_fp8: bool = False
    full_finetuning: bool = False
    fast_inference: bool | Auto = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSection:
    """The LoRA adapter that is trained. Its output is multiplied by alpha/r, or by alpha/sqrt(r) if
    ``use_rslora`` is true.

    ``target_modules`` "auto" means the layers that ``config.lora_targets.default_targets`` returns
    for the model. ``adapter_path`` is the adapter from which training starts. Keys that the run
    file does not set get their values from that adapter.
    """

    r: int = 16
    lora_alpha: int = 16
    target_modules: tuple[str, ...] | str = "auto"
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_gradient_checkpointing: bool | Literal["auto", "unsloth"] = "auto"
    use_rslora: bool = False
    use_dora: bool = False
    random_state: int = 3407
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    alpha_pattern: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    modules_to_save: tuple[str, ...] | None = None
    init_lora_weights: bool | str = True
    adapter_path: str | None = None

    @property
    def largest_rank(self) -> int:
        """The largest rank that the adapter has at any layer. The rank of the engine's adapter
        slots must be at least this rank.
        """
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSection:
    """The dataset that contains the prompts. ``path`` is a file, a folder that ``save_to_disk`` of
    the datasets library wrote, or a hub id. A run without ``path`` and without an environment is
    refused, because it has no prompts. ``config.chat_format`` resolves ``chat`` "auto".
    """

    path: str | None = None
    eval_path: str | None = None
    split: str = "train"
    eval_split: str | None = None
    name: str | None = None
    revision: str | None = None
    prompt: str = "prompt"
    answer: str | None = None
    system: str | None = None
    chat: bool | Auto = "auto"
    limit: int | None = None
    eval_limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSection:
    """A package of tasks that makes the prompts and scores the completions. A run has an
    environment instead of ``dataset.path``.

    ``options`` are the settings of the task. ``python`` is the interpreter in which the package is
    installed; None means the interpreter of the run.
    """

    adapter: Literal["reasoning_gym", "verifiers", "openenv"]
    task: str
    size: int = 1000
    eval_size: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    python: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolsSection:
    """Functions of the user (``module:function``) that the model may call in a chat.

    ``timeout_s`` limits the time of one call. ``on_error`` says what happens if a function fails:
    the model gets the error as the answer ("answer"), or the run stops ("fail").
    """

    functions: tuple[str, ...]
    timeout_s: float | None = 30.0
    on_error: Literal["answer", "fail"] = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A reward function with its weight and options. ``name`` is the name of a built-in reward, or
    has the form ``module:function``.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection:
    """The reward functions, and what happens if a reward function fails."""

    functions: tuple[RewardFunction, ...] = ()
    on_error: Literal["fail", "none"] = "fail"
    timeout_s: float | None = 600.0
    isolate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSection:
    """The run folder, the engine, and how the run resumes."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    output_dir: str = "runs/run"
    resume: Literal["auto", "never", "must"] | str = "auto"
    reproducible: bool = True
    padding_free: bool = True
    pack_tokens: int | Auto = "auto"
    fused_kernels: bool | Auto = "auto"
    allow_code: tuple[str, ...] = ()
    allow_changed: tuple[str, ...] = ()
    keep_last: int = 2
    keep_best: int = 0
    max_bad_steps: int = 3
    log_completions: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A complete run. ``grpo`` contains the keys of the run file's grpo section: fields of TRL's
    GRPOConfig, and a few keys of the toolkit such as ``max_prompt_length``.
    """

    model: ModelSection
    lora: LoraSection = field(default_factory=LoraSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    reward: RewardSection = field(default_factory=RewardSection)
    grpo: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    environment: EnvironmentSection | None = None
    tools: ToolsSection | None = None
    source: str | None = None
