"""Sample completions for the trainer, either with the vLLM engine or with transformers.

In both cases each completion has its own seed (``completion_index``). TRL's own sampling uses the
global random generator of the process instead, so that a completion depends on everything that ran
before it.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from toolkit.base.errors import ConfigValueError, ToolkitWarning, UnsupportedError
from toolkit.config.sampling_keywords import describe_mismatch, find_problem, unreproduced_keywords
from toolkit.engine.hf_sampling import (
    StopStrings,
    max_completion_lengths,
    sample_completions,
    supports_row_seeds,
    truncate_completions,
)
from toolkit.engine.oom_backoff import BatchPart, generate_in_parts
from toolkit.engine.rollout_request import Rollout, Sampling, request_seed
from toolkit.train.report.memory_peaks import rollout_phase
from toolkit.train.step.kept_set import Distribution
from toolkit.train.step.step_errors import release_memory
from toolkit.train.trainer_seam import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import GenerationConfig, PreTrainedModel

    from toolkit.config.sampling_keywords import Engine
    from toolkit.engine.rollout_engine import RolloutEngine
    from toolkit.train.trainer_seam import TrainerSeam


class Timers:
    """Measures the seconds that are spent in each phase since the last ``pop_seconds``."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to the phase ``phase``."""
        begin = perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += perf_counter() - begin

    def pop_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, and set them to 0."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def find_engine(model: PreTrainedModel) -> RolloutEngine | None:
    """Return the engine that ``FastLanguageModel`` attached to the model, or None. If the model is
    wrapped (by PEFT or others), the wrapped models are searched too.
    """
    for _ in range(4):
        engine = getattr(model, "toolkit_engine", None)
        if engine is not None:
            return engine  # type: ignore[no-any-return]  # an attribute of a module has no type
        inner = getattr(model, "base_model", None) or getattr(model, "model", None)
        if inner is None or inner is model:
            return None
        model = inner
    return None


def sampler_name(model: PreTrainedModel, config: Any) -> Engine:
    """Return which library samples the completions of a trainer of ``model`` with ``config``:
    "vllm" or "transformers".

    The library decides which keywords of ``generation_kwargs`` are supported.
    """
    engine = find_engine(model)
    if engine is not None:
        return engine.sampler_name
    return "vllm" if getattr(config, "use_vllm", False) else "transformers"


def check_generation_kwargs(model: PreTrainedModel, config: Any, *, tools: bool = False) -> None:
    """Check that the library that samples for ``model`` supports every keyword in
    ``generation_kwargs``.

    The messages are the same as for a run file. Some keywords change the distribution from which
    tokens are sampled, and the training pass does not apply these keywords. Without a vLLM engine,
    no importance weights correct the difference, so this function warns of such a keyword. With a
    vLLM engine, ``importance_sampling.warn_of_collapse`` warns later if the difference is large.

    Raises:
        ConfigValueError: a keyword is not supported. The message names the first such keyword.
    """
    keywords, engine = getattr(config, "generation_kwargs", None) or {}, sampler_name(model, config)
    for name, value in keywords.items():
        problem = find_problem(name, value, engine, multi_turn=tools)
        if problem is not None:
            raise ConfigValueError(
                problem.message, where=f"grpo.generation_kwargs.{name}", fix=problem.fix
            )
        if tools and name in ("presence_penalty", "frequency_penalty"):
            raise ConfigValueError(
                (
                    f"with tools, {name} counts the tokens of one turn, but training scores all "
                    "turns as one completion"
                ),
                where=f"grpo.generation_kwargs.{name}",
                fix=f"remove `{name}`, or use `repetition_penalty`, which counts the tokens of "
                "all turns",
            )
    biased = list(unreproduced_keywords(keywords, engine))
    if biased and engine == "transformers" and find_engine(model) is None:
        warnings.warn(
            "the training pass does not apply these keywords of generation_kwargs: "
            f"{', '.join(biased)}. So {describe_mismatch(engine)}",
            ToolkitWarning,
            stacklevel=3,
        )


def sampled_distribution(trainer: TrainerSeam) -> Distribution:
    """Return the distribution that the trainer's completions are drawn from. It has only the
    settings that the training pass can apply.
    """
    args = getattr(trainer, "args", None)
    keywords = getattr(args, "generation_kwargs", None) or {}
    return Distribution(
        temperature=getattr(trainer, "temperature", 1.0),
        top_p=getattr(trainer, "top_p", 1.0),
        top_k=getattr(trainer, "top_k", 0),
        min_p=getattr(trainer, "min_p", None) or 0.0,
        repetition_penalty=getattr(trainer, "repetition_penalty", 1.0),
        presence_penalty=keywords.get("presence_penalty", 0.0),
        frequency_penalty=keywords.get("frequency_penalty", 0.0),
        min_p_first=sampler_name(getattr(trainer, "model", None), args) == "vllm",
    )


@contextmanager
def seeded(seed: int, device: torch.device | None) -> Iterator[None]:
    """A context manager. In the block, torch's random generators start from ``seed``. After the
    block, their earlier state is restored.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


class EngineGeneration:
    """An object that replaces TRL 1.16's object ``vllm_generation`` and samples with the vLLM
    engine in this process.

    TRL calls the methods ``sync_weights()`` and ``generate(...)``. The engine shares the base
    weights with the trainer, so ``sync_weights`` copies only the adapter to the engine.
    """

    def __init__(self, trainer: TrainerSeam, engine: RolloutEngine) -> None:
        self.trainer, self.engine = trainer, engine

    @property
    def llm(self) -> Any:
        """An object from which TRL's tool loop reads the maximum sequence length, as
        ``llm.llm_engine.model_config.max_model_len``.
        """
        config = SimpleNamespace(max_model_len=getattr(self.engine, "max_model_len", None))
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))

    def sync_weights(self) -> None:
        """Copy the current values of the adapter to the engine."""
        with self.trainer.timers("publish_s"):
            self.engine.publish(unwrapped(self.trainer, self.trainer.model))

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[Any, Any, Any, Any]:
        """Draw one completion for each row of ``prompts`` (token ids).

        Consecutive equal rows are the group of one prompt. Returns ``(prompt_ids, completion_ids,
        logprobs, logprob_token_ids)`` in TRL's layout, with one entry per row of ``prompts``.

        Raises:
            UnsupportedError: the prompts have images.
        """
        if images is not None and any(images):
            raise UnsupportedError(
                "the engine supports only text, but the prompts have images",
                where="dataset",
                fix="remove the images from the dataset",
            )
        seed, rows = self.trainer.completion_index.begin_call(prompts)
        per_request = group_size(prompts, num_generations)
        with profiler or nullcontext(), rollout_phase(self.trainer, self.engine):
            rollout: Rollout = self.engine.generate(
                prompts[::per_request],
                self.sampling_options(per_request),
                seed=seed,
                rows=rows[::per_request],
            )
        self.trainer.completion_index.record_completions(rows, prompts, rollout.completion_ids)
        # With sleep mode, this frees the memory of the KV cache for the training step.
        self.engine.sleep()
        return rollout.as_tuple()

    def sampling_options(self, n: int) -> Sampling:
        """Return the current sampling options of the trainer, for ``n`` completions per prompt."""
        trainer = self.trainer
        return Sampling(
            n=n,
            max_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p,
            repetition_penalty=trainer.repetition_penalty,
            structured_outputs_regex=trainer.args.vllm_structured_outputs_regex,
            logprobs=0,
            extra=dict(trainer.args.generation_kwargs or {}),
        )


def tokenize_distinct(tokenize: Callable[[list[Any]], Any], prompts: list[Any]) -> Any:
    """Return what ``tokenize(prompts)`` returns: token ids, images and other fields of the prompts.

    ``tokenize`` is TRL's ``_tokenize_prompts``. To save time, equal prompts that follow one another
    (as in a group) are tokenized only once, and share the result. If this result contains images or
    other fields, it is not used, and ``tokenize`` is called again with all prompts.
    """
    starts = [
        index for index, prompt in enumerate(prompts) if index == 0 or prompt != prompts[index - 1]
    ]
    if len(starts) < len(prompts):
        ids, images, fields = tokenize([prompts[index] for index in starts])
        if images is None and not fields:
            ends = [*starts[1:], len(prompts)]
            sizes = [end - start for start, end in zip(starts, ends, strict=True)]
            rows = zip(ids, sizes, strict=True)
            return [list(row) for row, size in rows for _ in range(size)], None, fields
    return tokenize(prompts)


def group_size(prompts: list[list[int]], num_generations: int) -> int:
    """Return how many consecutive items of ``prompts`` can be sampled with one request.

    One request computes one prompt once, and samples several completions of it. So one request can
    replace several equal items. If all items within each group are equal, the result is
    ``num_generations``. If they are not equal, for example after a turn with a tool, the result is
    1. The result is also 1 if this rank has only a part of a group.
    """
    if num_generations < 2 or len(prompts) % num_generations:
        return 1
    for start in range(0, len(prompts), num_generations):
        group = prompts[start : start + num_generations]
        if any(ids != group[0] for ids in group[1:]):
            return 1
    return num_generations


class TransformersGeneration:
    """Draws completions with transformers, with TRL's generation config. If memory runs out, the
    batch is split into halves.
    """

    def __init__(self, trainer: TrainerSeam) -> None:
        self.trainer = trainer

    def can_generate(self, images: Any, multimodal_fields: Any) -> bool:
        """Return True if this class can generate the batch. If it cannot, TRL generates.

        This class does not support images, beam search, continuous batching and sharded models.
        """
        trainer = self.trainer
        sharded = getattr(trainer, "is_fsdp_enabled", False) or getattr(
            trainer, "is_deepspeed_enabled", False
        )
        trl_generates = sharded or getattr(trainer, "use_transformers_continuous_batching", False)
        config = getattr(trainer, "generation_config", None)
        if images is not None or multimodal_fields or trl_generates or config is None:
            return False
        return supports_row_seeds(config)

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Draw one completion for each prompt. Prompts and completions are lists of token ids."""
        trainer = self.trainer
        seed, rows = trainer.completion_index.begin_call(prompts)
        model = unwrapped(trainer, trainer.model)
        config, strings = self._config()
        max_length = getattr(model, "max_seq_length", None)
        if max_length is not None:
            shortest_prompt = min(map(len, prompts))
            config.max_new_tokens = min(config.max_new_tokens, max(1, max_length - shortest_prompt))

        def generate_part(part: BatchPart) -> Rollout:
            seeds = [request_seed(seed, row) for row in part.rows]
            stop = StopStrings(trainer.text_tokenizer, strings) if strings else None
            options = {} if stop is None else {"stopping_criteria": StoppingCriteriaList([stop])}
            sampled_BT, _ = sample_completions(model, part.prompts, config, seeds, options)
            max_tokens = (
                None
                if max_length is None
                else max_completion_lengths(part.prompts, len(part.prompts), max_length)
            )
            ids = truncate_completions(sampled_BT, trainer.eos_token_ids, stop, max_tokens)
            return Rollout([list(prompt) for prompt in part.prompts], ids, None, None)

        rollout, trainer.rows_at_once = generate_in_parts(
            generate_part,
            BatchPart(prompts, rows, n=1),
            trainer.rows_at_once,
            max_num_seqs=len(prompts),
            recover=release_memory,
        )
        trainer.completion_index.record_completions(rows, prompts, rollout.completion_ids)
        return rollout.completion_ids

    def _config(self) -> tuple[GenerationConfig, Any]:
        """Return TRL's generation config without its stop strings, and the stop strings.

        Values are converted to those that transformers accepts: floats, and 0 for no top-k. Stop
        strings are returned separately, because generation with stop strings needs a tokenizer.
        """
        config = copy.deepcopy(self.trainer.generation_config)
        for name in ("temperature", "top_p", "repetition_penalty"):
            setattr(config, name, float(getattr(config, name)))
        config.top_k = max(config.top_k or 0, 0)
        strings, config.stop_strings = config.stop_strings, None
        return config, strings
