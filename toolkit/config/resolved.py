"""Decide what a run is, in one place: engine, dtype, processes, device, the adapter's layers, and
what the node must have.

``validate``, ``check``, ``size``, ``train`` and the drop-in API all use this module. The caller
passes the facts of the machine as plain values (``Situation``); this module reads nothing itself. A
value that the run file sets is never changed, so resolving twice gives the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

from toolkit.base.capability import BFLOAT16
from toolkit.config.chat_format import chosen, refuse_chats
from toolkit.config.parallel import replicas, size_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.config.run_config import Dtype, RunConfig

Engine = Literal["vllm", "transformers", "maybe"]
"""The engine that generates. ``maybe`` is vLLM if the run trains on a GPU and vLLM is installed,
else transformers.
"""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The facts of a card that the decisions need. ``compute_capability`` None means no GPU, and
    (0, 0) a card that does not report it. ``machine`` is set only for a card that is not in this
    machine. For such a card the locked builds are checked; for a card in this machine, `envcheck
    check` checks the installed builds.
    """

    name: str
    compute_capability: tuple[int, int] | None
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Facts that are not in the run file.

    ``world_size`` is the number of training processes. ``device`` None is unknown. ``vllm`` says
    whether vLLM is installed on the machine that trains. None is unknown, and on a GPU it counts as
    installed.
    """

    world_size: int = 1
    device: DeviceFacts | None = None
    vllm: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """A run with its open decisions made. In ``config``, engine, dtype, the adapter's layers and
    the chat format are set as far as they are known.

    ``dtype`` and ``targets`` stay "auto" if the machine or the model is unknown. ``chat`` says
    whether plain prompts become user messages (``config.chat_format``); None is unknown.
    ``asked_dtype`` is the format that the run file sets, else "auto".
    """

    config: RunConfig
    engine: Engine
    dtype: str
    asked_dtype: str
    world_size: int
    device: DeviceFacts | None
    targets: tuple[str, ...] | str
    chat: bool | None = None

    @property
    def replicas(self) -> int:
        """The number of groups of processes that have rows of their own: one per process, unless
        several processes share a model.
        """
        size = self.config.model.tensor_parallel_size
        return replicas(self.world_size, 1 if self.engine == "transformers" else size)

    def needs(self) -> dict[str, Any]:
        """What the run requires of its node, under the names of ``gpu``'s ``CheckContext``.

        ``config`` and ``gpu`` do not import each other, so the caller passes these values on.
        Requirements of vLLM are left out if vLLM does not run. None means that sizing will choose
        the value.
        """
        model = self.config.model
        vllm = self.engine != "transformers"
        share = model.gpu_memory_utilization
        return {
            "configured": True,
            "engine": "auto" if self.engine == "maybe" else self.engine,
            "load_in_4bit": model.load_in_4bit,
            "load_in_8bit": model.load_in_8bit,
            "float8_kv_cache": vllm and model.float8_kv_cache,
            "dtype": self.asked_dtype,
            "gpu_memory_utilization": float(share) if vllm and share != "auto" else None,
            "tensor_parallel_size": size_of(model.tensor_parallel_size) if vllm else 1,
            "model": model.model_name,
            "revision": model.revision,
        }


def resolve_run(
    config: RunConfig,
    situation: Situation,
    *,
    targets: tuple[str, ...] | None = None,
    template: bool | None = None,
) -> ResolvedRun:
    """Decide the values that ``config`` does not set. ``targets`` are the default layers of the
    model (``config.lora_targets.default_targets``), if the model is available. ``template`` says
    whether its tokenizer has a chat template.

    Raises:
        ConfigError: ``dataset.chat`` is true, and the tokenizer has no chat template.
    """
    refuse_chats(config, template)
    model, grpo = config.model, config.grpo
    engine = engine_of(config.runtime.engine, model.fast_inference, situation)
    dtype = dtype_of(model.dtype, situation, grpo=grpo, load_in_16bit=model.load_in_16bit)
    layers = config.lora.target_modules
    if layers == "auto" and targets is not None:
        layers = targets
    chat = chosen(config.dataset.chat, template)
    fast = model.fast_inference if engine == "maybe" else engine == "vllm"
    filled = replace(
        config,
        model=replace(model, fast_inference=fast, dtype=cast("Dtype", dtype)),
        lora=replace(config.lora, target_modules=layers),
        dataset=replace(config.dataset, chat="auto" if chat is None else chat),
    )
    return ResolvedRun(
        config=filled,
        engine=engine,
        dtype=dtype,
        asked_dtype="bfloat16" if grpo.get("bf16") and model.dtype == "auto" else model.dtype,
        world_size=situation.world_size,
        device=situation.device,
        targets=layers,
        chat=chat,
    )


def engine_of(engine: str, fast_inference: bool | str, situation: Situation) -> Engine:
    """The engine that generates: ``runtime.engine`` if set, else ``model.fast_inference``, else
    vLLM if there is a GPU and vLLM is installed.
    """
    if engine != "auto":
        return "vllm" if engine == "vllm" else "transformers"
    if fast_inference != "auto":
        return "vllm" if fast_inference else "transformers"
    if situation.device is None:
        return "transformers" if situation.vllm is False else "maybe"
    if situation.device.compute_capability is None or situation.vllm is False:
        return "transformers"
    return "vllm"


def dtype_of(
    dtype: str,
    situation: Situation,
    *,
    grpo: Mapping[str, Any] | None = None,
    load_in_16bit: bool = False,
) -> str:
    """The format of the weights and of the trainer's computations if ``model.dtype`` is "auto".

    It is the format that ``grpo.bf16`` or ``grpo.fp16`` sets, because engine and trainer must use
    the same one. Otherwise it is bfloat16 on a GPU that supports it (compute capability 8.0),
    float16 on an older GPU, and float32 on a CPU, whatever the checkpoint stores: on a CPU float32
    is both fast and exact. ``load_in_16bit`` on a CPU means bfloat16. The result is "auto" if the
    device is unknown.
    """
    if dtype != "auto":
        return dtype
    asked = grpo or {}
    if situation.device is None:
        return "auto"
    capability = situation.device.compute_capability
    if asked.get("bf16"):
        return "bfloat16"
    if capability is None:
        return "bfloat16" if load_in_16bit else "float32"
    if asked.get("fp16"):
        return "float16"
    # (0, 0): the card does not report it; cards that old are rare.
    return "bfloat16" if capability >= BFLOAT16 or capability == (0, 0) else "float16"


def vllm_here() -> bool | None:
    """Whether this installation has vLLM. None if torch is missing: then only the light commands
    are installed, and training happens in another installation.
    """
    if find_spec("vllm") is not None:
        return True
    return None if find_spec("torch") is None else False
