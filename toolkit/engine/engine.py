"""Define ``Engine``, a running vLLM engine with the interface that the rest of the toolkit uses."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.lora.request import LoRARequest

from toolkit.base.errors import ConfigError, ConfigValueError, ToolkitError
from toolkit.engine import token_generation as generation
from toolkit.engine.adapter import AdapterSlots
from toolkit.engine.dequantized import COPIES_ATTRIBUTE
from toolkit.engine.mesh import close_mesh, current_mesh
from toolkit.engine.oom_agreement import generate_together
from toolkit.engine.oom_backoff import BatchPart, generate_in_parts
from toolkit.engine.rollout_request import check_prompts
from toolkit.engine.sleep import KvSleep
from toolkit.engine.vllm_errors import (
    RESTART_FIX,
    closed_error,
    failed_earlier_error,
    to_toolkit_error,
)
from toolkit.engine.vllm_internals import drop_requests, open_internals, shut_down

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedModel
    from vllm import LLM

    from toolkit.config.sampling_keywords import Engine as SamplerName
    from toolkit.engine.dequantized import DequantizedCopies
    from toolkit.engine.engine_options import EngineOptions
    from toolkit.engine.rollout_request import Rollout, Sampling

IN_MEMORY_PATH = "in-memory"  # a LoRARequest needs a path even for an adapter in memory
FIRST_FILE_ADAPTER_ID = (
    1000  # first id of adapters from files; the ids of published adapters begin at 1
)


class Engine:
    """A vLLM engine in this process. ``open_engine.open_engine`` creates it. The class is a context
    manager and implements the interface ``rollout_engine.RolloutEngine``.
    """

    sampler_name: SamplerName = "vllm"

    def __init__(self, llm: LLM, options: EngineOptions, *, owns_process_group: bool) -> None:
        self._llm: LLM | None = llm
        self.options = options
        self._owns_process_group = owns_process_group
        internals = open_internals(llm)
        self._module: nn.Module | None = internals.module
        slots = internals.lora_manager
        self._adapters = (
            None if slots is None else AdapterSlots(slots, internals.module, options.max_lora_rank)
        )
        self._kv_sleep = KvSleep(llm) if options.enable_sleep_mode is True else None
        self._copies: DequantizedCopies | None = getattr(internals.module, COPIES_ATTRIBUTE, None)
        self._file_requests: dict[str, LoRARequest] = {}
        self._published_models: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self._failure: ToolkitError | None = None
        self._max_completions_per_call: int | None = None

    @property
    def llm(self) -> LLM:
        """The ``vllm.LLM`` of the engine.

        Raises:
            ConfigError: the engine is closed.
        """
        if self._llm is None:
            raise closed_error()
        return self._llm

    @property
    def module(self) -> nn.Module:
        """vLLM's model (a torch module). The trainer shares its parameters."""
        if self._module is None:
            raise closed_error()
        return self._module

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        dtype: torch.dtype = self.llm.llm_engine.vllm_config.model_config.dtype
        return dtype

    @property
    def max_model_len(self) -> int:
        """The maximum length of prompt plus completion, in tokens."""
        return int(self.llm.llm_engine.vllm_config.model_config.max_model_len)

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._llm is None

    def publish(self, peft_model: PreTrainedModel, name: str = "default") -> None:
        """Copy the current values of adapter ``name`` of a PEFT model to the engine. Cached
        prefixes that were computed with earlier values of the adapter are dropped.

        The PEFT model does not change. Only the copies in the engine are multiplied by the scaling,
        and they have the engine's dtype.

        Raises:
            ConfigValueError: the adapter does not exist, or its rank is above ``max_lora_rank``.
            UnsupportedError: the engine has no slot for a layer of the adapter.
        """
        self._check_usable()
        if self._adapters is None:
            raise ConfigError(
                "the engine has no LoRA slots",
                where="engine",
                fix="open the engine with enable_lora=True",
            )
        self._adapters.publish(peft_model, name)
        self._published_models[name] = peft_model
        self._versions[name] = self._versions.get(name, 0) + 1
        self.llm.reset_prefix_cache()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        adapter: bool | str = True,
        rows: Sequence[int] | None = None,
    ) -> Rollout:
        """Draw ``sampling.n`` completions of each prompt.

        Args:
            prompts: token ids of each prompt.
            sampling: sampling parameters.
            seed: the seed of the whole batch. The seed of a completion is computed from this seed
                and the row of the completion (``rollout_request.request_seed``).
            rows: the row of each prompt's first completion in the batch. Needed if the call draws
                only a part of the batch.
            adapter: which weights to sample from. True means the adapter that was last published
                as ``"default"``, or the base model if none was published. A name means the adapter
                of that name. False means the base model.

        Raises:
            ConfigValueError: vLLM rejects a sampling option, or a prompt is too long.
            NodeError, RetryError, ConfigError: the engine failed. If the cause is known, the
                message names the check of `envcheck check` that detects the cause.

        If memory runs out, the batch is drawn in smaller parts. An out-of-memory error is raised
        only if a single completion does not fit.
        """
        self._check_usable()
        check_prompts(prompts, sampling.max_tokens, self.max_model_len)
        self.wake()
        request = self._adapter_request(adapter)
        if rows is None:
            rows = range(0, len(prompts) * sampling.n, sampling.n)

        def generate_part(batch_part: BatchPart) -> Rollout:
            part_sampling = (
                sampling if batch_part.n == sampling.n else replace(sampling, n=batch_part.n)
            )
            call = partial(
                generation.generate,
                self.llm,
                batch_part.prompts,
                part_sampling,
                seed,
                request,
                batch_part.rows,
            )
            return call() if mesh is None else generate_together(mesh, call)

        mesh = current_mesh()
        try:
            rollout, self._max_completions_per_call = generate_in_parts(
                generate_part,
                BatchPart(prompts, rows, sampling.n),
                self._max_completions_per_call,
                max_num_seqs=self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs,
                recover=lambda: drop_requests(self.llm),
            )
            if mesh is not None:
                mesh.check_same("completions", rollout.completion_ids)
        except ToolkitError as problem:
            self._failure = problem if mesh is not None else None
            raise
        except Exception as problem:
            self._failure = to_toolkit_error(problem, "the rollout failed", RESTART_FIX)
            raise self._failure from problem
        except BaseException:  # interrupted: the next call must not get the outputs of this call
            drop_requests(self.llm)
            raise
        return rollout

    def vllm_generate(self, inputs: Any, sampling_params: Any, **keywords: Any) -> Any:
        """Call ``vllm.LLM.generate`` with these arguments, and return its results."""
        self._check_usable()
        self.wake()
        return generation.vllm_generate(self.llm, inputs, sampling_params, **keywords)

    def lora_request(self, name: str = "default") -> LoRARequest:
        """Return vLLM's ``LoRARequest`` for a published adapter, to pass to ``llm.generate``."""
        self._check_usable()
        if self._adapters is None or name not in self._adapters.adapter_ids:
            raise ConfigValueError(
                f"no adapter {name!r} has been published",
                where="engine",
                fix="call publish with this adapter first",
            )
        if not self._adapters.is_active(name):  # an adapter from a file has taken over the slot
            self.publish(self._published_models[name], name)
        # vLLM stores cached prefixes under this name. Each version of the adapter has its own name,
        # so prefixes of earlier values are never used, even if the cache could not be reset.
        version = f"{name}@{self._versions[name]}"
        return LoRARequest(version, self._adapters.adapter_ids[name], IN_MEMORY_PATH)

    def load_lora(self, folder: str) -> LoRARequest:
        """Return vLLM's ``LoRARequest`` for the adapter saved in ``folder`` (PEFT's layout). vLLM
        reads the folder when the request is first used.
        """
        self._check_usable()
        if folder not in self._file_requests:
            self._file_requests[folder] = LoRARequest(
                folder, FIRST_FILE_ADAPTER_ID + len(self._file_requests), folder
            )
        return self._file_requests[folder]

    def sleep(self) -> None:
        """Release the memory that only rollouts need: the 16-bit copies of 4-bit weights and, if
        the engine was built with ``enable_sleep_mode``, the KV cache. Weights and LoRA slots stay
        in memory.
        """
        if self._copies is not None:
            self._copies.release()
        if self._kv_sleep is not None:
            self._kv_sleep.sleep()

    def wake(self) -> None:
        """Allocate the KV cache again, and fill the 16-bit copies of 4-bit weights. Does nothing if
        the engine is awake.

        Raises:
            NodeError, RetryError or ConfigError: there is not enough memory. A known cause
                determines the class of the error, and the error names the check of
                `envcheck check` that detects this cause. Any other cause raises a NodeError.
        """
        if self._kv_sleep is not None:
            self._kv_sleep.wake()
        if self._copies is None:
            return
        try:
            self._copies.fill()
        except (RuntimeError, MemoryError) as problem:
            failure = "the 4-bit weights could not be dequantized for a rollout"
            raise to_toolkit_error(problem, failure, RESTART_FIX) from problem

    def close(self) -> None:
        """Shut the engine down and release its memory. A second call does nothing.

        The memory of the weights is freed only after the model that shares the weights is dropped
        too.
        """
        if self._llm is None:
            return
        llm, self._llm, self._module = self._llm, None, None
        if self._kv_sleep is not None:
            self._kv_sleep.wake_for_close()
        if self._copies is not None:
            self._copies.close()
        if self._adapters is not None:
            self._adapters.clear()
        self._adapters = self._kv_sleep = self._copies = None
        self._published_models.clear()
        close_mesh()  # must be called before vLLM destroys its process groups
        shut_down(llm, keep_process_group=not self._owns_process_group)
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self.closed:
            raise closed_error()
        if self._failure is not None:
            raise failed_earlier_error(self._failure)

    def _adapter_request(self, adapter: bool | str) -> LoRARequest | None:
        if adapter is False or self._adapters is None:
            return None
        name = "default" if adapter is True else adapter
        if adapter is True and name not in self._adapters.adapter_ids:
            return None
        return self.lora_request(name)
