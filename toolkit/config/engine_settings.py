"""Define each option of the vLLM engine that a user may set, in one place.

Each field of ``EngineSettings`` is a key of the run file's ``model`` section. ``ApiEngineSettings``
adds the options that only ``FastLanguageModel.from_pretrained`` accepts. A field's type, its
default and its ``Option`` define the option completely. The following are derived from them:

- the option's schema in ``schemas/run.schema.json`` (``just schemas`` writes it there),
- the field of the run file's ``ModelSection``,
- the argument that vLLM gets (``EngineOptions``),
- the default of ``from_pretrained`` and its checks of the value,
- whether the key has no effect without an engine, and whether `envcheck size --write` sets it.

To add an option, add a field here and run ``just schemas``. Three kinds of options need more:

- If the option changes how much memory the engine uses, add a field to ``EnginePlan``, set the
  field in ``sizing.engine_plan``, and read it in ``sizing.engine_bytes``.
- If the sizer chooses the value for "auto" (``is_sized``), add a field to ``sizing.result.Choice``,
  and set it in ``sizing.build_result._choice``.
- If vLLM does not have the option, implement it in ``engine.start``.
"""

# ruff: noqa: RUF009 - _option makes a dataclass field, as dataclasses.field does
from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from toolkit.config.libraries import LEGAL_RANKS

if TYPE_CHECKING:
    from collections.abc import Mapping

Auto = Literal["auto"]
Kind = Literal["switch", "count", "amount", "share", "rank", "any"]
"""The kinds of values. switch: true or false. count: an integer above 0. amount: true, false or an
integer above 0. share: a number between 0 and 1. rank: one of vLLM's adapter ranks. any: any value,
which only vLLM checks.
"""


class Option(NamedTuple):
    """The properties of one option besides its name, type and default.

    ``api_default`` is the default of ``from_pretrained``. None means that vLLM chooses the value.
    ``vllm_argument`` is the name of the argument of ``vllm.LLM`` that gets the option's value. None
    means that vLLM has no such argument, and the toolkit implements the option itself.
    ``vllm_values`` maps the option's value to the value of the vLLM argument. If it maps the value
    to None, the argument is not passed to vLLM. ``is_sized`` says whether `envcheck size` chooses a
    value for "auto" (and writes it to the run file with ``--write``).
    """

    kind: Kind
    api_default: Any
    description: str = ""
    vllm_argument: str | None = None
    vllm_values: Mapping[Any, Any] = MappingProxyType({})
    auto_description: str | None = None
    examples: tuple[Any, ...] = ()
    unit: str | None = None
    rule: str | None = None
    nullable: bool = False
    needs_lora: bool = False
    gpu_only: bool = False
    is_sized: bool = False


def _option(default: object, kind: Kind, **properties: Any) -> Any:
    return field(default=default, metadata={"option": Option(kind, **properties)})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The engine options of a run file. Lengths are in tokens, memory is in bytes."""

    share_weights: bool = _option(
        True,
        "switch",
        api_default=True,
        description="true: engine and trainer use one copy of the base weights. false: each has its"
        " own copy, which is necessary for models whose weights cannot be shared.",
        examples=(True, False),
    )
    max_lora_rank: int | Auto = _option(
        "auto",
        "rank",
        api_default=64,
        description="The largest adapter rank that the engine can load. vLLM allows only these "
        "values. auto chooses the smallest value that is at least lora.r.",
        vllm_argument="max_lora_rank",
        auto_description="the smallest allowed rank that is at least lora.r",
        examples=("auto", 16, 64),
        unit="rank",
        rule="LORA002",
        needs_lora=True,
        is_sized=True,
    )
    gpu_memory_utilization: float | Auto = _option(
        "auto",
        "share",
        api_default=0.5,
        description="The fraction of the GPU's memory that the engine may use for weights and "
        "KV cache. auto: the toolkit computes it from the model, the GPU's memory and the "
        "memory that the trainer needs.",
        vllm_argument="gpu_memory_utilization",
        auto_description="computed from the model, the GPU's memory and the memory that the trainer"
        " needs",
        examples=("auto", 0.5, 0.6),
        unit="fraction of the GPU's memory",
        rule="LOAD008",
        gpu_only=True,
        is_sized=True,
    )
    float8_kv_cache: bool = _option(
        False,
        "switch",
        api_default=False,
        description="Store the KV cache in 8-bit floating point, so that it has room for twice as "
        "many tokens. This needs a GPU of compute capability 8.0 or higher; it is fast from 8.9.",
        vllm_argument="kv_cache_dtype",
        vllm_values=MappingProxyType({True: "fp8", False: None}),
        examples=(False,),
    )
    max_num_seqs: int | Auto = _option(
        "auto",
        "count",
        api_default=None,
        description="The maximum number of sequences that the engine decodes at the same time.",
        vllm_argument="max_num_seqs",
        auto_description="computed from the size of the KV cache and the batch size",
        examples=("auto", 64),
        unit="sequences",
        is_sized=True,
    )
    max_num_batched_tokens: int | Auto = _option(
        "auto",
        "count",
        api_default=None,
        description="The maximum number of tokens that the engine processes in one step.",
        vllm_argument="max_num_batched_tokens",
        auto_description="chosen by `envcheck size`, which may leave the choice to vLLM",
        examples=("auto", 8192),
        unit="tokens",
        is_sized=True,
    )
    kv_cache_bytes: int | Auto | None = _option(
        "auto",
        "count",
        api_default=None,
        description="The size of the KV cache in bytes if the engine runs on a CPU. auto: as much "
        "as the rollouts of this run need. On a GPU, gpu_memory_utilization sets the size instead.",
        vllm_argument="kv_cache_memory_bytes",
        auto_description="computed from the number of sequences and their lengths in this run",
        examples=("auto", 1 << 30),
        unit="bytes",
    )
    dequantized_rollouts: bool | int | Auto = _option(
        "auto",
        "amount",
        api_default="auto",
        description="Make 16-bit copies of 4-bit weights when a rollout begins, sample with the "
        "copies, and release their memory when the rollout ends. The computed values are the same, "
        "and a decode step takes at most half the time. true: copy all 4-bit weights. A number: "
        "copy the largest weights, up to this number of bytes. false: copy none.",
        auto_description="as many copies as fit beside the KV cache of a whole rollout",
        examples=("auto", True, False),
        unit="bytes",
        gpu_only=True,
        is_sized=True,
    )
    max_loras: int = _option(
        1,
        "count",
        api_default=1,
        description="The number of adapters that the engine can use at the same time. Training "
        "needs one.",
        vllm_argument="max_loras",
        examples=(1,),
        unit="adapters",
        needs_lora=True,
    )
    max_cpu_loras: int | None = _option(
        None,
        "count",
        api_default=None,
        description="The number of adapters that the engine keeps in CPU memory. null: the value of"
        " max_loras.",
        vllm_argument="max_cpu_loras",
        examples=(None, 2),
        unit="adapters",
        nullable=True,
        needs_lora=True,
    )
    enforce_eager: bool = _option(
        False,
        "switch",
        api_default=False,
        description="Run the engine without CUDA graphs. The engine then starts sooner, but "
        "generates more slowly.",
        vllm_argument="enforce_eager",
        examples=(True, False),
    )
    enable_prefix_caching: bool = _option(
        True,
        "switch",
        api_default=True,
        description="Compute and store the KV cache of a shared prompt prefix only once. This "
        "makes many completions per prompt cheap.",
        vllm_argument="enable_prefix_caching",
        examples=(True,),
    )
    enable_chunked_prefill: bool | None = _option(
        True,
        "switch",
        api_default=None,
        description="Allow the engine to process a long prompt in several steps. If false, "
        "max_num_batched_tokens must be at least the length of the longest prompt.",
        vllm_argument="enable_chunked_prefill",
        examples=(True, False),
    )
    enable_sleep_mode: bool | Auto = _option(
        "auto",
        "switch",
        api_default=False,
        description="Release the memory of the KV cache during training passes. auto: true if "
        "`envcheck size` estimates that it helps.",
        vllm_argument="enable_sleep_mode",
        vllm_values=MappingProxyType({False: None}),
        auto_description="true if `envcheck size` estimates that it helps",
        examples=("auto", True, False),
        gpu_only=True,
        is_sized=True,
    )
    tensor_parallel_size: int | Auto = _option(
        1,
        "count",
        api_default=1,
        description="The number of GPUs over which one copy of the model is split, both in the "
        "engine and in training. The number of processes of the run is this number times the "
        "number of replicas.",
        vllm_argument="tensor_parallel_size",
        auto_description="the smallest number of GPUs whose memory is enough for the run",
        examples=(1, 2, "auto"),
        unit="GPUs",
        is_sized=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiEngineSettings(EngineSettings):
    """The engine options of ``from_pretrained``. These are the engine options of a run file, and
    four more options of vLLM that a run file cannot set.
    """

    disable_log_stats: bool = _option(
        True, "switch", api_default=True, vllm_argument="disable_log_stats"
    )
    max_logprobs: int | None = _option(None, "any", api_default=None, vllm_argument="max_logprobs")
    block_size: int | None = _option(None, "count", api_default=None, vllm_argument="block_size")
    compilation_config: Any = _option(
        None, "any", api_default=None, vllm_argument="compilation_config"
    )


def _options_of(settings: type[EngineSettings]) -> Mapping[str, Option]:
    options = {item.name: item.metadata["option"] for item in fields(settings)}
    return MappingProxyType(options)


OPTIONS = _options_of(EngineSettings)
"""The ``Option`` of each engine key of the run file's model section."""

API_OPTIONS = _options_of(ApiEngineSettings)
"""The ``Option`` of each engine keyword of ``from_pretrained``."""

SIZED_OPTIONS = tuple(name for name, option in OPTIONS.items() if option.is_sized)
"""The names of the options for which ``toolkit.sizing`` chooses a value if they are "auto"."""


def schema_properties() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each engine option of a run file, by key."""
    defaults = {item.name: item.default for item in fields(EngineSettings)}
    return {name: _schema(name, option, defaults[name]) for name, option in OPTIONS.items()}


def _schema(name: str, option: Option, default: object) -> dict[str, Any]:
    title = name.replace("_", " ").capitalize().replace("Kv ", "KV ")
    facts = {"x-rule": option.rule, "x-unit": option.unit}
    return {
        "title": title,
        "description": option.description,
        **_legal_values(option),
        "default": default,
        "examples": list(option.examples),
        **{key: value for key, value in facts.items() if value is not None},
    }


def _legal_values(option: Option) -> dict[str, Any]:
    if option.kind == "rank":
        texts = (
            option.auto_description,
            *(f"for adapters of rank {rank} or less" for rank in LEGAL_RANKS),
        )
        return {"enum": ["auto", *LEGAL_RANKS], "enumDescriptions": list(texts)}
    shapes: dict[str, dict[str, Any]] = {
        "switch": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 1},
        "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    }
    if option.kind == "amount":
        auto = {"const": "auto", "description": option.auto_description}
        return {"anyOf": [shapes["switch"], shapes["count"], auto]}
    shape = shapes[option.kind]
    if option.nullable:
        shape = {**shape, "type": [shape["type"], "null"]}
    if option.auto_description is None:
        return shape
    return {"anyOf": [shape, {"const": "auto", "description": option.auto_description}]}


MAX_GRAPH_SIZE = 1024
"""The largest batch (in sequences) for which a CUDA graph is captured. A larger graph would save
too little launch time to be worth its memory.
"""


def graph_sizes(max_num_seqs: int, max_num_batched_tokens: int | None = None) -> list[int]:
    """Return the batch sizes (in sequences) for which the engine captures CUDA graphs of a decode
    step, in ascending order. A batch of another size runs in the graph of the next larger size.

    The sizes are 1, 2, 4, 8, then two sizes per doubling (16, 24, 32, 48 ...), and the largest
    batch that a rollout can have. vLLM's own list contains every multiple of 8 below 256, and
    every multiple of 16 from 256 to 512. The list here can be shorter, because padding a batch
    costs little: a decode step reads all weights for any number of sequences.
    """
    largest = min(max_num_seqs, max_num_batched_tokens or max_num_seqs, MAX_GRAPH_SIZE)
    sizes = {1, 2, 4, 8, *(16 << step for step in range(7)), *(24 << step for step in range(6))}
    return sorted(size for size in sizes | {largest} if size <= largest)
