"""Define the options of an engine and convert them to the arguments of ``vllm.LLM``."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from toolkit.base.errors import ConfigValueError, UnsupportedError
from toolkit.config.engine_settings import API_OPTIONS, ApiEngineSettings, graph_sizes
from toolkit.config.lora_targets import SLOTS as LAYERS_WITH_SLOTS

if TYPE_CHECKING:
    from collections.abc import Mapping

LOADER = "toolkit_shared"
"""The name under which ``engine.weight_loader`` is registered in vLLM."""

OWNED = frozenset(
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
"""vLLM arguments that weight sharing depends on; ``extra`` must not set them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ApiEngineSettings):
    """All options of an engine: those that a user may set, and those that the toolkit decides.

    Lengths are in tokens, memory in bytes; ``gpu_memory_utilization`` is a share of the GPU's total
    memory. None and "auto" mean that vLLM decides. ``extra`` takes any other vLLM engine argument
    under vLLM's own name. ``lora_target_modules`` are the layers with adapter slots, by the last
    part of their name; None means every layer that vLLM supports.
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
        """Reject unsupported options before anything heavy is imported.

        Raises:
            UnsupportedError: tensor parallelism without shared weights, or remote code.
            ConfigValueError: an ``extra`` argument that the toolkit sets, or that has its own
                field.
        """
        if self.tensor_parallel_size != 1 and not self.share_weights:
            raise UnsupportedError(
                f"tensor_parallel_size={self.tensor_parallel_size}: the trainer computes on the"
                " part of the model that the engine of its process holds, and share_weights is"
                " false",
                where="model.tensor_parallel_size",
                fix="set share_weights: true, or tensor_parallel_size: 1",
            )
        if self.trust_remote_code:
            raise UnsupportedError(
                "an engine on a model with remote code is not supported: its layers cannot be "
                "compared with vLLM's",
                where="model.trust_remote_code",
                fix="set trust_remote_code: false, or fast_inference: false",
            )
        for name in self.extra:
            if name in OWNED:
                raise ConfigValueError(
                    f"the engine argument {name!r} is set by the toolkit",
                    where=f"engine option {name}",
                    fix="leave it out",
                )
            if name in self.__dataclass_fields__:
                raise ConfigValueError(
                    f"{name!r} has its own field",
                    where="EngineOptions.extra",
                    fix=f"pass {name}=...",
                )

    def to_vllm(self, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
        """The keyword arguments of ``vllm.LLM``. For None, vLLM chooses the value."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "revision": self.revision,
            "tokenizer_revision": self.revision,
            "max_model_len": self.max_model_len,
            "dtype": self.dtype,
            "seed": self.seed,
            "skip_tokenizer_init": self.skip_tokenizer_init,
            # Request log-probabilities after temperature, top-k, top-p, min-p and penalties, which
            # are those of the distribution that tokens are sampled from.
            "logprobs_mode": "processed_logprobs",
            "use_tqdm_on_load": False,
            **self._settings(device),
        }
        arguments["enforce_eager"] = self.enforce_eager or device == "cpu"
        if self.enable_lora:
            arguments["enable_lora"] = True
            arguments["lora_target_modules"] = list(self.lora_target_modules or ()) or None
        if device == "cuda" and not arguments["enforce_eager"] and self.compilation_config is None:
            arguments["compilation_config"] = self._graphs()
        if self.load_in_4bit:
            arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
        elif self.share_weights:
            arguments["load_format"] = LOADER
        arguments |= self.extra
        return {name: value for name, value in arguments.items() if value is not None}

    def _graphs(self) -> dict[str, Any]:
        """The arguments for CUDA graphs. If the largest batch is known, only a few sizes up to it
        are captured.
        """
        sequences, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if not isinstance(sequences, int):
            return dict(GRAPHS_ONLY)
        sizes = graph_sizes(sequences, tokens if isinstance(tokens, int) else None)
        return {**GRAPHS_ONLY, "cudagraph_capture_sizes": sizes}

    def _settings(self, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
        """The options that a user may set, under vLLM's names."""
        arguments = {}
        for name, option in API_OPTIONS.items():
            unused = (option.on_gpu and device == "cpu") or (
                option.with_lora and not self.enable_lora
            )
            value = getattr(self, name)
            if option.vllm is not None and not unused and value != "auto":
                arguments[option.vllm] = option.values.get(value, value) if option.values else value
        return arguments


GRAPHS_ONLY = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Use CUDA graphs for decode steps and no torch.compile. Rollouts are mostly decode steps, and with
a graph compilation does not save more time. On an H100 and the Llama-3.2-1B shape (vLLM 0.25.1, 64
sequences) decode reaches 15k to 17k tokens/s with and without compilation. Without compilation the
engine starts 27 s faster with a cold cache, and without graphs for mixed batches another 10 s
faster. ``compilation_config`` overrides these settings.
"""
