"""TRL's GRPOTrainer with an engine that shares the model's weights, and with exact resume.

The trainer is a subclass and takes TRL's arguments. The source of upstream libraries is not
patched. Each method that overrides one of TRL 1.16 or transformers 5.17 is short, and calls other
modules for the work. Attributes have defaults at class level, because ``__init__`` does not run in
TRL's own tests, which build trainers with ``object.__new__``.
"""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import trl

from toolkit.base.errors import ConfigValueError
from toolkit.engine.mesh import current_mesh, run_on_first
from toolkit.engine.rollout_request import check_prompts, request_seed
from toolkit.policy.lora import keep_adapter_float32
from toolkit.policy.tensor_parallel.functions import clip_split_grad_norm
from toolkit.train import legal_batches, policy_setup, script_arguments
from toolkit.train.base_check import BaseCheck
from toolkit.train.checkpointing.resumable_trainer import ResumableTrainer
from toolkit.train.grpo_config import GRPOConfig, default_config
from toolkit.train.rollout import sampler
from toolkit.train.rollout.completion_index import CompletionIndex
from toolkit.train.rollout.prompt_choice import PromptChoice
from toolkit.train.rollout.sampler import EngineGeneration, Timers, find_engine
from toolkit.train.rollout.tools import StopRun
from toolkit.train.step import importance_sampling
from toolkit.train.step.packed_pass import LossScope
from toolkit.train.step.packed_steps import PackedSteps
from toolkit.train.step.step_retry import StepAttempt, loss_in_parts, skip_step
from toolkit.train.trainer_seam import CompletionBatch, TrlState, unwrapped

__all__ = ["GRPOConfig", "GRPOTrainer"]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from toolkit.train.rollout.dynamic_sampling import Generation
    from toolkit.train.rollout.tool_log import ToolLog
    from toolkit.train.tracking import Tracking
    from toolkit.train.trainer_seam import MemoryPeaks

TRL_SIGNATURE = inspect.signature(trl.GRPOTrainer.__init__)


class GRPOTrainer(ResumableTrainer, PackedSteps, TrlState, trl.GRPOTrainer):  # type: ignore[misc]  # TRL ships no types that strict mode can use
    """trl.GRPOTrainer that samples from the model's own vLLM engine, if the model has one."""

    max_bad_steps: int = 3
    bad_steps: int = 0
    peaks: MemoryPeaks | None = None
    base_check: dict[str, Any] | None = None
    tracking: Tracking | None = None
    tool_log: ToolLog | None = None
    _attempt: StepAttempt | None = None
    _has_bad_loss: bool = False
    collapse_reported: bool = False
    gap_reported: bool = False
    truncation_reported: bool = False
    rows_at_once: int | None = None
    unreplaced_groups_reported: bool = False
    _prompt_choice: PromptChoice | None = None
    _generation: Generation | None = None
    _loss_inputs: dict[str, Any] | None = None

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        """Takes TRL's arguments. The engine, gradient checkpointing and the dtype are those with
        which ``FastLanguageModel`` loaded the model. Therefore ``use_vllm`` has no effect, and
        TRL's defaults ``gradient_checkpointing=True`` and ``bf16=True`` are replaced. The adapter
        is converted to float32. Each process trains on one GPU.

        Raises:
            ConfigValueError: the loss type does not support the importance-sampling mode, the
                engine computes in another dtype, or the base weights were changed.
            UnsupportedError: the engine cannot sample from the adapter.
        """
        arguments = TRL_SIGNATURE.bind(self, model, *args, **kwargs).arguments
        del arguments["self"]
        engine = find_engine(model)
        config = arguments["args"] = arguments.get("args") or default_config(model)
        script_arguments.check_arguments(arguments, model)
        has_tools = bool(arguments.get("tools") or arguments.get("environment_factory"))
        sampler.check_generation_kwargs(model, config, tools=has_tools)
        policy_setup.fit_config_to_model(model, engine, config, arguments.get("peft_config"))
        if not isinstance(model, str):
            self.merge_micro_batches(config, model)
        vllm_hidden = nullcontext() if engine is None else _without_vllm(config)
        with vllm_hidden, keep_adapter_float32(model):
            super().__init__(**arguments)
        policy_setup.set_up_adapter(
            self, model, engine, is_new_adapter=arguments.get("peft_config") is not None
        )
        if engine is not None:
            self._use_engine(engine)

    def _use_engine(self, engine: Any) -> None:
        """Make TRL generate with ``engine``. Call this method after TRL's ``__init__``, because
        TRL's ``__init__`` builds its own engine if ``use_vllm`` is set.
        """
        token_modes = ("token_truncate", "token_mask")
        if (
            self.loss_type == "vespo"
            and self.vllm_importance_sampling_correction
            and self.vllm_importance_sampling_mode not in token_modes
        ):
            raise ConfigValueError(
                (
                    "the vespo loss needs a token-level mode of importance sampling, but "
                    "vllm_importance_sampling_mode is "
                    f"{self.vllm_importance_sampling_mode!r}"
                ),
                where="grpo.vllm_importance_sampling_mode",
                fix=f"set vllm_importance_sampling_mode to {token_modes[0]} or {token_modes[1]}",
            )
        self.use_vllm = True
        self.vllm_generation = EngineGeneration(self, engine)
        self._last_loaded_step = -1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does, and then check that the base weights did not change. ``base_check``
        contains the result of this check.

        Raises:
            ConfigError: the dataset has fewer prompts than one generation needs.
            DefectError: the base weights changed.
        """
        legal_batches.check_prompt_count(self.args, self.train_dataset)
        self.clear_module_caches()
        base_check = None if self._sharded() else BaseCheck(self.model)
        output = super().train(*args, **kwargs)
        self.base_check = None if base_check is None else base_check.result()
        return output

    # --- rollouts

    @property
    def timers(self) -> Timers:
        """The seconds that each phase (for example ``rollout_s``) took since the last step."""
        timers: Timers = self.__dict__.setdefault("_timers", Timers())
        return timers

    @property
    def disagreement(self) -> importance_sampling.Disagreement:
        """The totals of the differences between the log-probabilities of engine and trainer.
        Training and evaluation have separate totals. The result is for the model's current mode.
        """
        by_mode: dict[bool, importance_sampling.Disagreement] = self.__dict__.setdefault(
            "_disagreement", {}
        )
        return by_mode.setdefault(self.model.training, importance_sampling.Disagreement())

    @property
    def completion_index(self) -> CompletionIndex:
        """Gives each completion of this rank its index in the batch of all ranks."""
        index: CompletionIndex = self.__dict__.setdefault("_rows", CompletionIndex(self))
        return index

    @property
    def prompt_choice(self) -> PromptChoice:
        """The object that chooses prompts for dynamic sampling and the curriculum."""
        if self._prompt_choice is None:
            self._prompt_choice = PromptChoice(self)
        return self._prompt_choice

    def _generate(self, prompts: list[Any]) -> Any:
        """Generate as TRL does. After that, if ``dynamic_sampling`` is set, replace the groups
        without signal (all rewards of the group are equal).
        """
        self.completion_index.begin_batch(len(prompts))
        batch = super()._generate(prompts)
        generation = self._generation
        if generation is None or generation.is_drawing:
            return batch
        return generation.replace_groups_without_signal(prompts, CompletionBatch(*batch))

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        tokenize = super()._tokenize_prompts
        if getattr(self, "environment_factories", None) is not None:
            prompt_ids, images, fields = tokenize(prompts)  # rows have different tools
        else:
            prompt_ids, images, fields = sampler.tokenize_distinct(tokenize, prompts)
        return script_arguments.truncate_prompts(self, prompt_ids, images), images, fields

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate one turn as TRL does, but with a separate seed for each completion. TRL also
        calls this method in the tool loop.
        """
        parent = super()._generate_single_turn
        with self.timers("rollout_s"):
            if getattr(self, "use_vllm", False):
                return parent(prompt_ids, images, multimodal_fields, *args, **kwargs)
            max_seq_length = getattr(unwrapped(self, self.model), "max_seq_length", None)
            if max_seq_length is not None:
                check_prompts(prompt_ids, self.max_completion_length, max_seq_length)
            generation = sampler.TransformersGeneration(self)
            if generation.can_generate(images, multimodal_fields):
                # Hugging Face generation has no logprobs.
                return generation.generate(prompt_ids), None
            seed, rows = self.completion_index.begin_call(prompt_ids)
            device = getattr(getattr(self, "accelerator", None), "device", None)
            with sampler.seeded(request_seed(seed, rows[0]), device):
                output = parent(prompt_ids, images, multimodal_fields, *args, **kwargs)
            self.completion_index.record_completions(rows, prompt_ids, output[0])
            return output

    def _tool_call_loop(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the tool loop of TRL. In addition, record the tool calls of a training batch for the
        log. If a tool fails, the error of the tool may end the run.
        """
        parent, log = super()._tool_call_loop, self.tool_log
        try:
            if log is None or not self.model.training:
                return parent(prompts, *args, **kwargs)
            completions = inspect.signature(parent).bind(prompts, *args, **kwargs).arguments
            step = self.state.global_step
            calls = log.record_calls(
                self, completions["completions"], self.completion_index.row_numbers, step
            )
            output = parent(prompts, *args, **kwargs)
            log.gather_calls(calls)
            return output
        except StopRun as stop:
            raise stop.error from stop

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        if self._generation is not None and self._generation.rewards is not None:
            return self._generation.rewards  # each completion is scored once
        # Remove the values of the previous generation, because a reward need not log every time.
        self._logs["extra"].clear()
        parent = super()._calculate_rewards
        with self.timers("reward_s"):
            if current_mesh() is None:
                return parent(*args, **kwargs)
            # Moved to the CPU, because a process cannot use the device of another process.
            rewards = run_on_first(lambda: parent(*args, **kwargs).cpu())
            return rewards.to(self.accelerator.device)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not self.model.training or not self.prompt_choice.is_enabled:
            return self._generate_and_score(inputs)
        self._generation = generation = self.prompt_choice.begin_generation(inputs)
        try:
            output = self._generate_and_score(generation.inputs)
        finally:
            self._generation = None
        self.prompt_choice.end_generation(generation)
        return output

    # --- TRL's extra forward pass, skipped if the training forward computes the same numbers

    def _generate_and_score(self, inputs: Any) -> Any:
        if not importance_sampling.old_logps_are_redundant(self) or find_engine(self.model) is None:
            return super()._generate_and_score_completions(inputs)
        self.vllm_importance_sampling_correction = False
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.vllm_importance_sampling_correction = True

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        self._scope = self.loss_scope(inputs) if model.training else LossScope()
        self._loss_inputs = inputs = dict(inputs)
        try:
            if "sampling_per_token_logps" in inputs and "old_per_token_logps" in inputs:
                importance_sampling.record_old_gaps(self, inputs)
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs, self._scope = None, LossScope()

    def _trl_pass(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> Any:
        output = self.logps_and_entropies(model, *args, **kwargs)
        inputs = self._loss_inputs or {}
        if "sampling_per_token_logps" in inputs and "old_per_token_logps" not in inputs:
            importance_sampling.record_gaps(self, output[0], inputs, self._scope.skipped)
        return output

    # --- errors inside a step

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._attempt is None:
            return super()._prepare_inputs(generation_batch)
        if self._attempt.inputs is None:
            self._attempt.record_inputs(super()._prepare_inputs(generation_batch))
        return self._attempt.inputs

    def training_step(
        self, model: PreTrainedModel, inputs: Any, num_items_in_batch: Any = None
    ) -> Any:
        """Do a step as TRL does. If memory runs out, the step is repeated in smaller parts, which
        give the same gradient.
        """
        parent = super().training_step
        self._attempt = StepAttempt(self, model)
        try:
            loss = self._attempt.run(lambda: parent(model, inputs, num_items_in_batch))
        finally:
            self._attempt = None
        self._has_bad_loss = self._has_bad_loss or not bool(torch.isfinite(loss))
        return loss

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss as TRL does, but for one part of the batch at a time. A part is a pack
        (completions joined into one sequence). After memory ran out, the parts are smaller.
        """
        parent = super().compute_loss
        if not self.model.training:
            return parent(model, inputs, return_outputs, num_items_in_batch)
        parts = self.row_parts(inputs)
        with self.corrected_entropy_metric():
            if len(parts) > 1:
                return loss_in_parts(self, model, inputs, parts, lambda part: parent(model, part))
            return parent(model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model: PreTrainedModel) -> Any:
        """Clip the gradient as transformers does. If several processes share a model, use the norm
        of the complete adapter's gradient, and not the norm of the part in this process.
        """
        if current_mesh() is None:
            # Parameters without a gradient do not change the norm, but a model has many.
            trainable = SimpleNamespace(parameters=self.trained_parameters)
            return super()._clip_grad_norm(model if self._sharded() else trainable)
        return clip_split_grad_norm(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: PreTrainedModel, grad_norm: Any = None) -> Any:
        """Return the gradient norm as transformers does. transformers calls this method directly
        before each optimizer step. If the loss or the norm is NaN or infinite, the step is
        skipped.
        """
        if grad_norm is None and current_mesh() is not None:
            grad_norm = clip_split_grad_norm(model.parameters(), math.inf)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        is_bad, self._has_bad_loss = self._has_bad_loss or not math.isfinite(float(norm)), False
        if self._max_over_ranks(is_bad):
            skip_step(self, model)
        else:
            self.bad_steps = 0
        if self.signals is not None:
            self.signals.shield()  # the weights change after this
        return norm

    # --- metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as transformers does, but keep all losses. transformers would keep only as many
        losses as the dataset has rows. TRL's sampler repeats each row, so there are more losses.
        """
        self.gather_function = self.accelerator.gather
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does. In addition, log the differences between the log-probabilities of engine
        and trainer.
        """
        mode = "train" if self.model.training else "eval"
        for name, value in self.disagreement.pop_metrics(self.accelerator).items():
            self._metrics[mode][name] = [value]
        importance_sampling.warn_of_collapse(self)
        importance_sampling.warn_of_gap(self)
        super().log(logs, start_time)
        if self.signals is not None:
            # Keep only the last row, because the list is copied at each step. The log files have
            # all rows.
            self.state.log_history[:-1] = []


@contextmanager
def _without_vllm(config: Any) -> Iterator[None]:
    """Inside the ``with`` block, hide ``use_vllm`` and ``generation_kwargs`` from TRL's
    ``__init__``. With ``use_vllm``, TRL would build its own engine. Without it, TRL would pass
    ``generation_kwargs``, which are keywords of vLLM, to Hugging Face generation.
    """
    previous = config.use_vllm, config.generation_kwargs
    config.use_vllm, config.generation_kwargs = False, None
    try:
        yield
    finally:
        config.use_vllm, config.generation_kwargs = previous
