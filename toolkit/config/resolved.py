"""What a run is, decided once: engine, dtype, processes, device, the adapter's layers, and what
the node must have.

``validate``, ``check``, ``size``, ``train`` and the drop-in API all ask here. What is known of the
machine comes in as plain values (``Situation``): this module looks at nothing. A value that is
written is never changed, so resolving twice gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

from toolkit.base.capability import BFLOAT16
from toolkit.config.chat_format import chosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.config.run_config import Dtype, RunConfig

Engine = Literal["vllm", "transformers", "maybe"]
"""``maybe`` is vLLM where the run trains on a GPU and vLLM is installed, else transformers."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the decisions ask of a card; ``compute_capability`` None is a machine without a GPU, and
    (0, 0) a card that does not tell. ``machine`` is that of a card that is not here, for which the
    locked builds are judged; of one that is here envcheck check judges the installed ones.
    """

    name: str
    compute_capability: tuple[int, int] | None
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known besides the run file.

    ``world_size`` is how many processes train. ``device`` None is not known. ``vllm`` says whether
    vLLM is installed where the run trains; None is not known, and on a GPU it is taken to be.
    """

    world_size: int = 1
    device: DeviceFacts | None = None
    vllm: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """``config`` has engine, dtype and the adapter's layers filled as far as they are known.

    ``dtype`` and ``targets`` are "auto" where the machine or the model is not known. ``chat`` says
    whether plain prompts become user messages (``config.chat_format``); None is not known.
    ``asked_dtype`` is the format that the file itself asks for, else "auto".
    """

    config: RunConfig
    engine: Engine
    dtype: str
    asked_dtype: str
    world_size: int
    device: DeviceFacts | None
    targets: tuple[str, ...] | str
    chat: bool | None = None

    def needs(self) -> dict[str, Any]:
        """What the run asks of its node, under the names of ``gpu``'s ``CheckContext``.

        ``config`` and ``gpu`` do not know each other: who has both carries these over. What only
        vLLM reads is not asked for where vLLM does not run; None is what sizing will choose.
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
            "tensor_parallel_size": model.tensor_parallel_size if vllm else 1,
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
    """Decide what ``config`` leaves open. ``targets`` are the default layers of the model
    (``config.targets.default_targets``), where it is at hand; ``template`` says whether its
    tokenizer has a chat template.
    """
    model, grpo = config.model, config.grpo
    engine = engine_of(config.runtime.engine, model.fast_inference, situation)
    dtype = dtype_of(model.dtype, situation, grpo=grpo, load_in_16bit=model.load_in_16bit)
    layers = config.lora.target_modules
    if layers == "auto" and targets is not None:
        layers = targets
    fast = model.fast_inference if engine == "maybe" else engine == "vllm"
    filled = replace(
        config,
        model=replace(model, fast_inference=fast, dtype=cast("Dtype", dtype)),
        lora=replace(config.lora, target_modules=layers),
    )
    return ResolvedRun(
        config=filled,
        engine=engine,
        dtype=dtype,
        asked_dtype="bfloat16" if grpo.get("bf16") and model.dtype == "auto" else model.dtype,
        world_size=situation.world_size,
        device=situation.device,
        targets=layers,
        chat=chosen(config.dataset.chat, template),
    )


def engine_of(engine: str, fast_inference: bool | str, situation: Situation) -> Engine:
    """Who generates: ``runtime.engine`` where it is written, else ``model.fast_inference``, else
    vLLM on a GPU where it is installed.
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
    """What weights are held in and what the trainer computes in, where ``model.dtype`` is "auto".

    What ``grpo.bf16`` or ``grpo.fp16`` asks for, as the engine samples in the format that the
    trainer computes in. Else bfloat16 on a GPU that has it (compute capability 8.0), float16 on an
    older one, and float32 on a CPU, whatever the checkpoint stores: there it is the fast and exact
    one. ``load_in_16bit`` is bfloat16 on a CPU. "auto" where the device is not known.
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
    # (0, 0): the card does not tell; cards that old are rare.
    return "bfloat16" if capability >= BFLOAT16 or capability == (0, 0) else "float16"


def vllm_here() -> bool | None:
    """Whether runs of this installation have vLLM. None for the light commands alone, without
    torch: what trains is installed elsewhere.
    """
    if find_spec("vllm") is not None:
        return True
    return None if find_spec("torch") is None else False
