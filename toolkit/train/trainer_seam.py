"""The interface of the trainer for other modules of ``train``. Apart from the trainer's own
classes, only this module uses TRL's private names.

``TrainerSeam`` is a protocol class with all attributes of this interface. ``TrlState`` has public
properties for the private attributes of TRL 1.16 and transformers 5.17 that a run needs.
tests/contract/test_trl_seams.py checks that these private attributes exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, Trainer

from toolkit.policy.lora import is_peft

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from toolkit.engine.rollout_engine import RolloutEngine
    from toolkit.train.checkpointing.branch import Branch
    from toolkit.train.checkpointing.stop_signals import StopSignals


COMPLETION_METRICS = "completions/"
"""The prefix of the names of TRL's metrics of the completions in a batch."""


class CompletionBatch(NamedTuple):
    """The completions of this rank. The fields are the values that ``_generate`` of TRL 1.16
    returns, in the same order.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None
    completions: list[Any]
    logprobs: list[Any] | None
    extra_fields: dict[str, Any]
    images: Any
    tool_images: Any


def unwrapped(trainer: TrainerSeam, model: PreTrainedModel) -> Any:
    """Return ``model`` without the wrapper of a distributed run.

    accelerate's ``unwrap_model`` looks at every module of the model, which takes milliseconds. So
    it is called only if there may be a wrapper.
    """
    if isinstance(model, PreTrainedModel) or is_peft(model):
        return model
    return trainer.accelerator.unwrap_model(model)


class TrlState(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """A base class of the trainer with public names for private attributes of TRL's trainer."""

    tools: Any
    rollout_func: Any
    _cached_parameters: list[torch.nn.Parameter] | None = None
    _cached_dropouts: list[torch.nn.Dropout] | None = None

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the model with ``requires_grad``. The list of all parameters is kept
        for the whole run, because making it again in every step would take milliseconds.
        """
        if self._cached_parameters is None:
            self._cached_parameters = list(self.model.parameters())
        return [parameter for parameter in self._cached_parameters if parameter.requires_grad]

    def dropout_layers(self) -> list[torch.nn.Dropout]:
        """The dropout layers of the model. Like the list of parameters, this list is made once per
        run.
        """
        if self._cached_dropouts is None:
            modules = self.model.modules()
            self._cached_dropouts = [
                module for module in modules if isinstance(module, torch.nn.Dropout)
            ]
        return self._cached_dropouts

    def clear_module_caches(self) -> None:
        """Discard the stored lists of parameters and dropout layers. Each list is made again when
        it is next needed.
        """
        self._cached_parameters = self._cached_dropouts = None

    @property
    def metric_values(self) -> dict[str, list[float]]:
        """Maps the name of a metric to its values since the last log row. During an evaluation,
        only metrics of the evaluation are included; during training, only metrics of training.
        """
        values: dict[str, list[float]] = self._metrics["train" if self.model.training else "eval"]
        return values

    @property
    def train_metric_values(self) -> dict[str, list[float]]:
        """Maps the name of a training metric to its values since the last log row of training."""
        values: dict[str, list[float]] = self._metrics["train"]
        return values

    @property
    def completion_log(self) -> Mapping[str, Any]:
        """Prompts, completions, rewards and advantages of the last generation."""
        log: Mapping[str, Any] = self._logs
        return log

    @property
    def tools_by_row(self) -> list[dict[str, Any]]:
        """For each completion of this rank's batch, a mapping of tool names to tools."""
        found: list[dict[str, Any]] = self._sync_tool_dicts
        return found

    @tools_by_row.setter
    def tools_by_row(self, tools: list[dict[str, Any]]) -> None:
        self._sync_tool_dicts = tools

    @property
    def rollout_buffer(self) -> Any:
        """The micro-batches of the last generation that are buffered for later steps, or None."""
        return self._buffered_inputs

    @rollout_buffer.setter
    def rollout_buffer(self, inputs: Any) -> None:
        self._buffered_inputs = inputs

    @property
    def micro_steps(self) -> int:
        """The number of micro-batches on which the trainer has trained since the start."""
        return int(self._step)

    @property
    def micro_progress(self) -> tuple[int, float]:
        """The pair (``micro_steps``, seconds that the current optimizer step has taken so far)."""
        return int(self._step), float(self._current_train_step_time)

    @micro_progress.setter
    def micro_progress(self, value: tuple[int, float]) -> None:
        self._step, self._current_train_step_time = value

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer. With a multimodal processor, this is the tokenizer of the processor."""
        return self._tokenizer

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has an entropy term."""
        return bool(self._entropy_bonus_enabled)

    @property
    def training_rows(self) -> Any:
        """The training dataset, with only the columns that a batch contains."""
        rows = self.__dict__.get("_training_rows")
        if rows is None:
            rows = self._remove_unused_columns(self.train_dataset, description="training")
            self._training_rows = rows
        return rows

    @property
    def pending_columns(self) -> Any:
        """The values that rewards passed to ``log_extra`` and that are not yet logged, by column
        name.
        """
        return self._pending_extra_logs

    def generate_completions(self, prompts: list[Any]) -> Any:
        """Draw a completion for each of this rank's ``prompts``. Return a tuple with the values of
        the fields of ``CompletionBatch``.
        """
        return self._generate(prompts)

    def score_completions(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
    ) -> torch.Tensor:
        """Return the rewards of the completions of all ranks, as a float32 tensor with the shape
        (completions, reward functions).
        """
        rewards: torch.Tensor = self._calculate_rewards(
            inputs, prompts, completions, completion_ids
        )
        return rewards

    def completion_metric_counts(self) -> dict[str, int]:
        """Return a mapping from the name of each TRL metric of the completions to the number of
        values that the metric has got since the last log row.
        """
        values = self.train_metric_values
        return {name: len(values[name]) for name in values if name.startswith(COMPLETION_METRICS)}

    def log_completion_metrics(
        self, prompts: list[Any], batch: CompletionBatch, counts: Mapping[str, int]
    ) -> None:
        """Remove the metrics that were logged for the draws, and log TRL's metrics for ``batch``.
        ``counts`` is what ``completion_metric_counts`` returned before the first draw. All values
        that were logged later are removed.

        TRL computes these metrics in its method ``_generate``. Therefore this method calls
        ``_generate`` with a ``rollout_func`` that samples nothing and returns ``batch``. The number
        of tokens seen does not change, because the drawn tokens have already been counted.
        """
        values = self.train_metric_values
        for name in list(values):
            if name.startswith(COMPLETION_METRICS):
                del values[name][counts.get(name, 0) :]
        rollout = {
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
            "logprobs": batch.logprobs,
            "env_mask": batch.tool_mask,
        }
        previous = self.tools, self.rollout_func, self.state.num_input_tokens_seen
        self.tools, self.rollout_func = None, lambda *_: dict(rollout)
        try:
            super()._generate(prompts)
        finally:
            self.tools, self.rollout_func, self.state.num_input_tokens_seen = previous
        values["num_tokens"] = [self.state.num_input_tokens_seen]


class PhaseTimers(Protocol):
    """The seconds that each phase took (implemented by rollout.sampler.Timers)."""

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...
    def pop_seconds(self) -> dict[str, float]: ...


class RowNumbers(Protocol):
    """An object that gives each completion of a batch a row number (implemented by
    rollout.completion_index.CompletionIndex).
    """

    @property
    def generation(self) -> int: ...
    def begin_call(self, prompts: Sequence[list[int]]) -> tuple[int, list[int]]: ...
    def record_completions(
        self, numbers: list[int], prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> None: ...


class PromptRecords(Protocol):
    """The recorded spread of the rewards of each prompt, for the curriculum (implemented by
    rollout.prompt_choice.PromptChoice).
    """

    def state(self) -> dict[str, torch.Tensor] | None: ...
    def load(self, state: Mapping[str, torch.Tensor] | None) -> None: ...


class GapTotals(Protocol):
    """Totals of the differences between the log-probabilities of engine and trainer (implemented by
    step.importance_sampling.Disagreement).
    """

    def add(self, gap: torch.Tensor, ratio: torch.Tensor | None) -> None: ...


class RunLogs(Protocol):
    """The log files of a run (implemented by report.metrics_log.Journal)."""

    def positions(self) -> dict[str, int]: ...
    def digests(self) -> dict[str, str]: ...
    def sync(self) -> None: ...


class ToolCalls(Protocol):
    """The record of tool calls since the last log row (rollout.tool_log.ToolLog implements it)."""

    def write(self, journal: Any, step: int) -> None: ...


class MemoryPeaks(Protocol):
    """Peak memory in bytes by phase (implemented by report.memory_peaks.PhasePeaks)."""

    def sampling(self, engine: RolloutEngine) -> AbstractContextManager[None]: ...
    def so_far(self) -> int: ...


class TrainerSeam(Protocol):
    """The attributes of the trainer that other modules may use. This class is a protocol, because
    the trainer's module imports the other modules, and modules must not import in a cycle.

    Attributes without a comment are public attributes of TRL or transformers.
    """

    accelerator: Any
    args: Any
    model: Any
    state: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    current_flos: float
    reward_weights: torch.Tensor
    num_iterations: int
    num_generations: int
    multi_objective_aggregation: str
    loss_type: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    repetition_penalty: float
    max_completion_length: int
    generation_config: Any
    eos_token_ids: Any
    top_entropy_quantile: float
    aux_loss_enabled: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    use_vllm: bool
    vllm_generation: Any
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: str
    vllm_importance_sampling_clip_min: float | None
    vllm_importance_sampling_clip_max: float | None

    # TrlState: TRL's private state
    def trained_parameters(self) -> list[torch.nn.Parameter]: ...
    def dropout_layers(self) -> list[torch.nn.Dropout]: ...
    @property
    def metric_values(self) -> dict[str, list[float]]: ...
    @property
    def train_metric_values(self) -> dict[str, list[float]]: ...
    @property
    def completion_log(self) -> Mapping[str, Any]: ...
    @property
    def micro_steps(self) -> int: ...
    @property
    def text_tokenizer(self) -> Any: ...
    @property
    def has_entropy_bonus(self) -> bool: ...
    @property
    def training_rows(self) -> Any: ...
    @property
    def pending_columns(self) -> Any: ...
    def generate_completions(self, prompts: list[Any]) -> Any: ...
    def score_completions(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
    ) -> torch.Tensor: ...
    def completion_metric_counts(self) -> dict[str, int]: ...
    def log_completion_metrics(
        self, prompts: list[Any], batch: CompletionBatch, counts: Mapping[str, int]
    ) -> None: ...

    rollout_buffer: Any
    micro_progress: tuple[int, float]

    # checkpointing/resumable_trainer
    signals: StopSignals | None
    fingerprint: Mapping[str, Any]
    branch: Branch
    is_run_dir_lost: bool
    pending_evaluation: bool
    is_stopping: bool

    @property
    def journal(self) -> RunLogs | None: ...
    @property
    def tool_log(self) -> ToolCalls | None: ...
    @property
    def run_dir(self) -> Path: ...

    # step: packs, retries and skipped steps
    part_count: int
    min_parts: int
    bad_steps: int
    max_bad_steps: int
    collapse_reported: bool
    gap_reported: bool
    unreplaced_groups_reported: bool
    truncation_reported: bool
    rows_at_once: int | None  # rows of a generation that fit, if memory ran out before

    # The trainer's own: rollouts and metrics.
    peaks: MemoryPeaks | None

    @property
    def timers(self) -> PhaseTimers: ...
    @property
    def completion_index(self) -> RowNumbers: ...
    @property
    def prompt_choice(self) -> PromptRecords: ...
    @property
    def disagreement(self) -> GapTotals: ...
    def get_train_dataloader(self) -> Any: ...
    def add_callback(self, callback: Any) -> None: ...
    def remove_callback(self, callback: Any) -> None: ...
