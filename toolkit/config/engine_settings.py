"""The options of the vLLM engine that a user may set, with one record for each.

A field of ``EngineSettings`` is a key of the run file's ``model`` section; ``ApiEngineSettings``
adds the options that only ``FastLanguageModel.from_pretrained`` accepts. The field's type, its
default and its ``Option`` are the record. Everything else follows from it:

- ``schemas/run.schema.json`` (``just schemas`` writes ``schema_properties`` into it),
- the run file's ``ModelSection``, and ``EngineOptions`` with its arguments for vLLM,
- the defaults and the checks of ``from_pretrained``,
- which keys have no effect without an engine, and which ``size --write`` fills in.

To add an option: add a field here and run ``just schemas``; if it changes how much memory the
engine takes, read it in ``sizing.engine_plan``.
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
"""switch: true or false; count: an integer above 0; amount: true or false, or an integer above 0;
share: a number between 0 and 1; rank: one of vLLM's adapter ranks; any: vLLM checks it."""


class Option(NamedTuple):
    """The properties of one option besides its name, type and default.

    ``api``: the default of ``from_pretrained``, where None leaves the choice to vLLM. ``vllm``: the
    argument of ``vllm.LLM``, None where the toolkit acts on the option itself; ``values`` maps a
    value to the one that vLLM gets (None: the argument is left out). ``sized``: envcheck size
    replaces "auto" by a value, also in the file with ``--write``.
    """

    kind: Kind
    api: Any
    description: str = ""
    vllm: str | None = None
    values: Mapping[Any, Any] = MappingProxyType({})
    auto: str | None = None
    examples: tuple[Any, ...] = ()
    unit: str | None = None
    rule: str | None = None
    nullable: bool = False
    with_lora: bool = False
    on_gpu: bool = False
    sized: bool = False


def _option(default: Any, kind: Kind, **facts: Any) -> Any:
    return field(default=default, metadata={"option": Option(kind, **facts)})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The engine options of a run file. Lengths are in tokens, memory is in bytes."""

    share_weights: bool = _option(
        True,
        "switch",
        api=True,
        description="One copy of the base for engine and trainer. false keeps a second copy, for"
        " models that cannot share.",
        examples=(True, False),
    )
    max_lora_rank: int | Auto = _option(
        "auto",
        "rank",
        api=64,
        description="The largest adapter rank that the engine can load. vLLM allows only these "
        "values; auto chooses the smallest that is at least lora.r.",
        vllm="max_lora_rank",
        auto="the smallest legal rank that is at least lora.r",
        examples=("auto", 16, 64),
        unit="rank",
        rule="LORA002",
        with_lora=True,
        sized=True,
    )
    gpu_memory_utilization: float | Auto = _option(
        "auto",
        "share",
        api=0.5,
        description="The fraction of the GPU's memory that the engine may use for weights and "
        "KV cache. auto: chosen from the model, the card and the trainer's memory.",
        vllm="gpu_memory_utilization",
        auto="chosen from the model, the card and the trainer's memory",
        examples=("auto", 0.5, 0.6),
        unit="fraction of the card",
        rule="LOAD008",
        on_gpu=True,
        sized=True,
    )
    float8_kv_cache: bool = _option(
        False,
        "switch",
        api=False,
        description="Store the KV cache in 8-bit floating point. It holds twice the tokens and "
        "needs compute capability 8.0 (8.9 for native speed).",
        vllm="kv_cache_dtype",
        values=MappingProxyType({True: "fp8", False: None}),
        examples=(False,),
    )
    max_num_seqs: int | Auto = _option(
        "auto",
        "count",
        api=None,
        description="The maximum number of sequences that the engine decodes at a time.",
        vllm="max_num_seqs",
        auto="chosen from the KV cache and the batch",
        examples=("auto", 64),
        unit="sequences",
        sized=True,
    )
    max_num_batched_tokens: int | Auto = _option(
        "auto",
        "count",
        api=None,
        description="The maximum number of tokens that the engine processes in one step.",
        vllm="max_num_batched_tokens",
        auto="chosen by the sizer; vLLM's own choice if that is best",
        examples=("auto", 8192),
        unit="tokens",
        sized=True,
    )
    kv_cache_bytes: int | Auto | None = _option(
        "auto",
        "count",
        api=None,
        description="Memory of the KV cache of a CPU engine, in bytes. auto: what the rollouts "
        "of this run need. On a GPU gpu_memory_utilization decides.",
        vllm="kv_cache_memory_bytes",
        auto="chosen from the sequences and lengths of this run",
        examples=("auto", 1 << 30),
        unit="bytes",
    )
    dequantized_rollouts: bool | int | Auto = _option(
        "auto",
        "amount",
        api="auto",
        description="Sample from 16-bit copies of 4-bit weights: they are made when a rollout"
        " begins, and their memory is released when it ends. The same values are multiplied, and a"
        " decode step takes half the time or less. true: all 4-bit weights; a number: the largest"
        " in so many bytes; false: none.",
        auto="as many as fit beside the KV cache of a whole rollout",
        examples=("auto", True, False),
        unit="bytes",
        on_gpu=True,
        sized=True,
    )
    max_loras: int = _option(
        1,
        "count",
        api=1,
        description="The number of adapters that the engine holds at a time. Training needs one.",
        vllm="max_loras",
        examples=(1,),
        unit="adapters",
        with_lora=True,
    )
    max_cpu_loras: int | None = _option(
        None,
        "count",
        api=None,
        description="The number of adapters kept in main memory; null means max_loras.",
        vllm="max_cpu_loras",
        examples=(None, 2),
        unit="adapters",
        nullable=True,
        with_lora=True,
    )
    enforce_eager: bool = _option(
        False,
        "switch",
        api=False,
        description="Run the engine without CUDA graphs: starts sooner, generates slower.",
        vllm="enforce_eager",
        examples=(True, False),
    )
    enable_prefix_caching: bool = _option(
        True,
        "switch",
        api=True,
        description="Share the KV cache of equal prompt prefixes. This makes many completions "
        "per prompt cheap.",
        vllm="enable_prefix_caching",
        examples=(True,),
    )
    enable_chunked_prefill: bool | None = _option(
        True,
        "switch",
        api=None,
        description="Let the engine split a long prompt into several steps. Without it "
        "max_num_batched_tokens must be at least as long as a prompt.",
        vllm="enable_chunked_prefill",
        examples=(True, False),
    )
    enable_sleep_mode: bool | Auto = _option(
        "auto",
        "switch",
        api=False,
        description="Free the KV cache's memory while training. auto: if the sizer estimates "
        "that it helps.",
        vllm="enable_sleep_mode",
        values=MappingProxyType({False: None}),
        auto="if the sizer estimates that it helps",
        examples=("auto", True, False),
        on_gpu=True,
        sized=True,
    )
    tensor_parallel_size: int | Auto = _option(
        1,
        "count",
        api=1,
        description="Over how many GPUs one model is split, for the engine and for training. The"
        " run has that many processes times the number of replicas.",
        vllm="tensor_parallel_size",
        auto="the smallest number that holds the run",
        examples=(1, 2, "auto"),
        unit="GPUs",
        sized=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiEngineSettings(EngineSettings):
    """The engine options of ``from_pretrained``: the options of a run file, and options of vLLM for
    scripts.
    """

    disable_log_stats: bool = _option(True, "switch", api=True, vllm="disable_log_stats")
    max_logprobs: int | None = _option(None, "any", api=None, vllm="max_logprobs")
    block_size: int | None = _option(None, "count", api=None, vllm="block_size")
    compilation_config: Any = _option(None, "any", api=None, vllm="compilation_config")


def _options_of(settings: type[EngineSettings]) -> Mapping[str, Option]:
    found = {item.name: item.metadata["option"] for item in fields(settings)}
    return MappingProxyType(found)


OPTIONS = _options_of(EngineSettings)
"""Key in the run file's model section -> its record."""

API_OPTIONS = _options_of(ApiEngineSettings)
"""Keyword of ``from_pretrained`` -> its record."""

SIZED = tuple(name for name, option in OPTIONS.items() if option.sized)
"""Options for which the sizer replaces "auto" by a value."""


def schema_properties() -> dict[str, dict[str, Any]]:
    """The JSON Schema of each engine option of a run file."""
    defaults = {item.name: item.default for item in fields(EngineSettings)}
    return {name: _schema(name, option, defaults[name]) for name, option in OPTIONS.items()}


def _schema(name: str, option: Option, default: Any) -> dict[str, Any]:
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
        texts = (option.auto, *(f"room for adapters of rank up to {one}" for one in LEGAL_RANKS))
        return {"enum": ["auto", *LEGAL_RANKS], "enumDescriptions": list(texts)}
    shapes: dict[str, dict[str, Any]] = {
        "switch": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 1},
        "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    }
    if option.kind == "amount":
        auto = {"const": "auto", "description": option.auto}
        return {"anyOf": [shapes["switch"], shapes["count"], auto]}
    shape = shapes[option.kind]
    if option.nullable:
        shape = {**shape, "type": [shape["type"], "null"]}
    if option.auto is None:
        return shape
    return {"anyOf": [shape, {"const": "auto", "description": option.auto}]}


MAX_GRAPH_SIZE = 1024
"""The largest number of sequences for which a graph is captured. Larger graphs save too little
launch time to be worth their memory.
"""


def graph_sizes(max_num_seqs: int, max_num_batched_tokens: int | None = None) -> list[int]:
    """The batch sizes (in sequences) for which the engine captures CUDA graphs of a decode step, in
    ascending order. A batch runs in the graph of the next larger size.

    The sizes are 1, 2, 4, 8, then two sizes for each doubling, and the largest batch that a rollout
    can have. vLLM's own list has a size for every 8 sequences, and none above 512. Padding costs
    little, because a decode step reads all weights for any number of sequences.
    """
    largest = min(max_num_seqs, max_num_batched_tokens or max_num_seqs, MAX_GRAPH_SIZE)
    sizes = {1, 2, 4, 8, *(16 << step for step in range(7)), *(24 << step for step in range(6))}
    return sorted(size for size in sizes | {largest} if size <= largest)
