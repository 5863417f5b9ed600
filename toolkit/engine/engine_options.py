"""Define the options of an engine and convert them to the arguments of ``vllm.LLM``."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from toolkit.base.errors import ConfigValueError, UnsupportedError
from toolkit.config.engine_settings import API_OPTIONS, ApiEngineSettings, graph_sizes
from toolkit.config.lora_targets import SLOT_LAYERS as LAYERS_WITH_SLOTS

if TYPE_CHECKING:
    from collections.abc import Mapping

LOAD_FORMAT = "toolkit_shared"
"""The name under which ``engine.weight_loader`` is registered in vLLM."""

RESERVED_ARGUMENTS = frozenset(
    {
        "model",
        "load_format",
        "logprobs_mode",
        "enable_lora",
        "sleep_mode_backend",
        "worker_cls",
        "runner",
        "quantization",
    }
)
"""vLLM arguments that weight sharing depends on. The toolkit sets them, and ``extra`` must not
contain them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ApiEngineSettings):
    """All options of an engine: those that a user may set, and those that the toolkit decides.

    Lengths are in tokens, and memory is in bytes. ``gpu_memory_utilization`` is a share of the
    GPU's total memory. None and "auto" mean that vLLM decides. ``extra`` takes any other vLLM
    engine argument under vLLM's own name. ``lora_target_modules`` lists the layers that get LoRA
    slots, by the last part of their names (such as ``q_proj``). If it is None, every layer for
    which vLLM supports LoRA gets a slot.
    """

    model: str
    revision: str | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    enable_lora: bool = True
    max_lora_rank: int = 16
    lora_target_modules: tuple[str, ...] | None = LAYERS_WITH_SLOTS
    enable_chunked_prefill: bool | None = None
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    skip_tokenizer_init: bool = False
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Reject unsupported options before vLLM is imported.

        Raises:
            UnsupportedError: the options combine tensor parallelism with unshared weights, or
                allow remote code.
            ConfigValueError: ``extra`` contains an argument that the toolkit sets, or one that is a
                field of this class.
        """
        if self.tensor_parallel_size != 1 and not self.share_weights:
            raise UnsupportedError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs share_weights: true,"
                " because the trainer computes with the part of the weights that the engine in its"
                " process has loaded",
                where="model.tensor_parallel_size",
                fix="set `share_weights: true`, or set `tensor_parallel_size: 1`",
            )
        if self.trust_remote_code:
            raise UnsupportedError(
                "an engine for a model with remote code is not supported, because the toolkit "
                "cannot check that the layers of the remote code match vLLM's layers",
                where="model.trust_remote_code",
                fix="set `trust_remote_code: false`, or set `fast_inference: false`",
            )
        for name in self.extra:
            if name in RESERVED_ARGUMENTS:
                raise ConfigValueError(
                    f"the toolkit sets the engine argument {name!r} itself",
                    where=f"engine option {name}",
                    fix=f"remove {name}",
                )
            if name in self.__dataclass_fields__:
                raise ConfigValueError(
                    f"extra contains {name!r}, which is a field of EngineOptions",
                    where="EngineOptions.extra",
                    fix=f"pass {name}=... instead of extra",
                )

    def to_vllm(self, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
        """Return the keyword arguments of ``vllm.LLM``. An option with the value None is left out,
        so that vLLM chooses its value.
        """
        arguments: dict[str, Any] = {
            "model": self.model,
            "revision": self.revision,
            "tokenizer_revision": self.revision,
            "max_model_len": self.max_model_len,
            "dtype": self.dtype,
            "seed": self.seed,
            "skip_tokenizer_init": self.skip_tokenizer_init,
            # Request the log-probabilities of the distribution that tokens are sampled from, which
            # is the one after temperature, top-k, top-p, min-p and penalties.
            "logprobs_mode": "processed_logprobs",
            "use_tqdm_on_load": False,
            **self._user_arguments(device),
        }
        arguments["enforce_eager"] = self.enforce_eager or device == "cpu"
        if self.enable_lora:
            arguments["enable_lora"] = True
            arguments["lora_target_modules"] = list(self.lora_target_modules or ()) or None
        if device == "cuda" and not arguments["enforce_eager"] and self.compilation_config is None:
            arguments["compilation_config"] = self._graph_config()
        if self.load_in_4bit:
            arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
        elif self.share_weights:
            arguments["load_format"] = LOAD_FORMAT
        arguments |= self.extra
        return {name: value for name, value in arguments.items() if value is not None}

    def _graph_config(self) -> dict[str, Any]:
        """Return vLLM's compilation settings for CUDA graphs. If the largest batch is known, graphs
        are captured only for a few batch sizes up to the largest.
        """
        sequences, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if not isinstance(sequences, int):
            return dict(GRAPHS_ONLY)
        sizes = graph_sizes(sequences, tokens if isinstance(tokens, int) else None)
        return {**GRAPHS_ONLY, "cudagraph_capture_sizes": sizes}

    def _user_arguments(self, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
        """Return the options that a user may set, under vLLM's names."""
        arguments = {}
        for name, option in API_OPTIONS.items():
            unused = (option.gpu_only and device == "cpu") or (
                option.needs_lora and not self.enable_lora
            )
            value = getattr(self, name)
            if option.vllm_argument is not None and not unused and value != "auto":
                arguments[option.vllm_argument] = (
                    option.vllm_values.get(value, value) if option.vllm_values else value
                )
        return arguments


GRAPHS_ONLY = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Use CUDA graphs for decode steps, and do not use torch.compile. Rollouts are mostly decode steps,
and torch.compile does not make a decode step with a CUDA graph faster. On an H100 with the shape of
Llama-3.2-1B (vLLM 0.25.1, 64 sequences), decoding reaches 15k to 17k tokens/s with and without
compilation. Without compilation the engine starts 27 s faster with a cold cache. Without graphs for
mixed batches (prefill and decode) it starts another 10 s faster. ``compilation_config`` overrides
these settings.
"""
