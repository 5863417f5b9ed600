"""Decide everything that a run file leaves open: the engine, the dtype, the processes, the device,
the adapter's layers, and what the machine that trains must provide.

The commands ``validate``, ``check``, ``size`` and ``train`` and the drop-in API all use this
module. The caller passes the facts of the machine as a ``Situation``, because this module does not
inspect the machine. A value that the run file sets is never changed, so resolving a resolved run
again gives the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

from toolkit.base.capability import BFLOAT16
from toolkit.config.chat_format import check_chat_template, resolve_chat
from toolkit.config.parallel import count_replicas, parallel_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.config.run_config import Dtype, RunConfig

Engine = Literal["vllm", "transformers", "maybe"]
"""The engine that generates the rollouts. ``maybe`` means that the facts of the machine are not
known yet: it is vLLM if the run trains on a GPU and vLLM is installed, else transformers.
"""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The facts of a device on which the decisions depend. ``compute_capability`` is None if the
    device is not a GPU, and (0, 0) if the GPU does not report its compute capability.

    ``machine`` is the CPU architecture ("x86_64" or "aarch64"). It is set only if the GPU is in
    another machine. Validation then checks whether the lock files have package builds for
    ``machine``. For a GPU in this machine, `envcheck check` checks the installed packages instead.
    """

    name: str
    compute_capability: tuple[int, int] | None
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The facts about the training processes and their machine. The run file does not contain them,
    but what it leaves open (such as the engine and the dtype) is decided by these facts.

    ``world_size`` is the number of training processes. ``device`` is the device that trains; None
    means unknown. ``vllm`` says whether vLLM is installed on the machine that trains; None means
    unknown. If ``vllm`` is None and the device is a GPU, vLLM is assumed to be installed.
    """

    world_size: int = 1
    device: DeviceFacts | None = None
    vllm: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """A run after all open decisions were made. ``config`` contains the chosen engine, dtype,
    adapter layers and chat format, as far as they are known.

    ``dtype`` stays "auto" if the machine is unknown. ``targets`` stays "auto" if the model is not
    available. ``chat`` says whether plain text prompts become user messages
    (``config.chat_format``); None means unknown. ``requested_dtype`` is the number format that the
    run file sets with ``model.dtype`` or ``grpo.bf16``, or "auto" if it sets none.
    """

    config: RunConfig
    engine: Engine
    dtype: str
    requested_dtype: str
    world_size: int
    device: DeviceFacts | None
    targets: tuple[str, ...] | str
    chat: bool | None = None

    @property
    def replicas(self) -> int:
        """The number of replicas. A replica is a group of processes that share one copy of the
        model and train on the same rows. Without tensor parallelism, each process is a replica.
        """
        size = self.config.model.tensor_parallel_size
        return count_replicas(self.world_size, 1 if self.engine == "transformers" else size)

    def machine_requirements(self) -> dict[str, Any]:
        """Return what the run requires of the machine that trains, as a dict. Its keys are the
        names of the fields of ``CheckContext`` in ``toolkit.gpu``. A value of None means that
        sizing chooses the value later. For a run without vLLM, the dict contains no requirements of
        vLLM.

        The result is not a ``CheckContext``, because the packages ``config`` and ``gpu`` do not
        import each other.
        """
        model = self.config.model
        vllm = self.engine != "transformers"
        memory_share = model.gpu_memory_utilization
        return {
            "configured": True,
            "engine": "auto" if self.engine == "maybe" else self.engine,
            "load_in_4bit": model.load_in_4bit,
            "load_in_8bit": model.load_in_8bit,
            "float8_kv_cache": vllm and model.float8_kv_cache,
            "dtype": self.requested_dtype,
            "gpu_memory_utilization": float(memory_share)
            if vllm and memory_share != "auto"
            else None,
            "tensor_parallel_size": parallel_size(model.tensor_parallel_size) if vllm else 1,
            "model": model.model_name,
            "revision": model.revision,
        }


def resolve_run(
    config: RunConfig,
    situation: Situation,
    *,
    targets: tuple[str, ...] | None = None,
    has_template: bool | None = None,
) -> ResolvedRun:
    """Decide the values that ``config`` leaves open. ``targets`` are the model's default layers for
    the adapter (``config.lora_targets.default_targets``); None if the model is not available.
    ``has_template`` says whether the model's tokenizer has a chat template; None means unknown.

    Raises:
        ConfigError: ``dataset.chat`` is true, and the tokenizer has no chat template.
    """
    check_chat_template(config, has_template)
    model, grpo = config.model, config.grpo
    engine = resolve_engine(config.runtime.engine, model.fast_inference, situation)
    dtype = resolve_dtype(model.dtype, situation, grpo=grpo, load_in_16bit=model.load_in_16bit)
    layers = config.lora.target_modules
    if layers == "auto" and targets is not None:
        layers = targets
    chat = resolve_chat(config.dataset.chat, has_template)
    fast_inference = model.fast_inference if engine == "maybe" else engine == "vllm"
    resolved_config = replace(
        config,
        model=replace(model, fast_inference=fast_inference, dtype=cast("Dtype", dtype)),
        lora=replace(config.lora, target_modules=layers),
        dataset=replace(config.dataset, chat="auto" if chat is None else chat),
    )
    return ResolvedRun(
        config=resolved_config,
        engine=engine,
        dtype=dtype,
        requested_dtype="bfloat16" if grpo.get("bf16") and model.dtype == "auto" else model.dtype,
        world_size=situation.world_size,
        device=situation.device,
        targets=layers,
        chat=chat,
    )


def resolve_engine(engine: str, fast_inference: bool | str, situation: Situation) -> Engine:
    """Return the engine that generates the rollouts.

    If ``runtime.engine`` is not "auto", it names the engine. If it is "auto", and
    ``model.fast_inference`` is true or false, true selects vLLM and false selects transformers.

    If both keys are "auto", the result depends on the machine. If vLLM is known to be missing, the
    engine is transformers. Otherwise the engine is vLLM on a GPU, transformers on a CPU, and
    "maybe" if the device is unknown.
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


def resolve_dtype(
    dtype: str,
    situation: Situation,
    *,
    grpo: Mapping[str, Any] | None = None,
    load_in_16bit: bool = False,
) -> str:
    """Return the number format of the weights and of the trainer's computations, as the name of a
    torch dtype.

    ``dtype`` is the value of ``model.dtype``. If it is not "auto", it is returned unchanged. If it
    is "auto", the result depends on the device:

    - Device unknown: "auto".
    - GPU: bfloat16 if ``grpo.bf16`` is true, float16 if ``grpo.fp16`` is true. The keys decide
      because engine and trainer must use the same format. If neither key is true, the result is
      bfloat16 if the GPU has compute capability 8.0 or higher, and float16 if it is older.
    - CPU: bfloat16 if ``grpo.bf16`` or ``load_in_16bit`` is true. Otherwise float32, which is both
      fast and exact on a CPU.
    """
    if dtype != "auto":
        return dtype
    settings = grpo or {}
    if situation.device is None:
        return "auto"
    capability = situation.device.compute_capability
    if settings.get("bf16"):
        return "bfloat16"
    if capability is None:
        return "bfloat16" if load_in_16bit else "float32"
    if settings.get("fp16"):
        return "float16"
    # (0, 0) means that the card does not report its capability. Assume bfloat16, because cards
    # without it are rare.
    return "bfloat16" if capability >= BFLOAT16 or capability == (0, 0) else "float16"


def is_vllm_installed() -> bool | None:
    """Whether vLLM is installed in this Python environment. Return None if torch is not installed.
    Training then happens in another Python environment, and this one runs only light commands such
    as `envcheck`.
    """
    if find_spec("vllm") is not None:
        return True
    return None if find_spec("torch") is None else False
