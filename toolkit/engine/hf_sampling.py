"""Sample with ``generate`` of Hugging Face transformers, with a separate seed for each row.

transformers samples a whole batch from one global generator, so the tokens of a row depend on its
position in the batch. But a batch may be split over ranks, or halved if memory runs out. Therefore
in this module each row has its own random generator. For each token the generator draws one number
in [0, 1). The sampled token is the first one at which the cumulative probability exceeds this
number.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode

from toolkit.base.errors import ConfigValueError, first_line
from toolkit.config.sampling_keywords import KEYWORDS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_DRAW = 32
"""The number of tokens whose random numbers are drawn at once. They are then copied to the GPU in
one copy.
"""


_KEPT_DEFAULTS = frozenset(
    {
        "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "disable_compile",
        "compile_config", "continuous_batching_config",
        "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
    }
)  # fmt: skip
"""The options that are taken from a checkpoint's generation config: how completions are computed,
and the ids of special tokens.
"""


class RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types that strict mode can use
    """The logits processor that runs after all others. It samples one token per row, and gives all
    other tokens the score -inf.

    If ``keep_scores`` is True, the attribute ``scores`` collects the scores that each call gets,
    one (B, V) tensor per token.
    """

    def __init__(self, seeds: Sequence[int], *, keep_scores: bool) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._numbers: list[torch.Tensor] = []
        self._keep_scores = keep_scores
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Return (B, V) scores: 0 for the sampled token, -inf for the others.

        Raises:
            ConfigValueError: scores are NaN or infinite.
        """
        del input_ids
        if self._keep_scores:
            self.scores.append(scores_BV)
        number_B1 = self._next_numbers(scores_BV.device)
        cumulative_BV = torch.softmax(scores_BV.double(), -1).cumsum(-1)
        total_B1 = cumulative_BV[:, -1:].contiguous()
        if not total_B1.isfinite().all():
            raise ConfigValueError(
                "the model's logits are not finite. Either its weights contain NaN or infinity, or "
                f"values exceed the range of {str(scores_BV.dtype).removeprefix('torch.')}",
                where="rollout",
                fix="lower grpo.learning_rate. If it happens in the first step, copy the "
                "checkpoint again. If dtype is float16, use bfloat16 or float32",
            )
        # Keep the number below the total probability even after rounding, so that the selected
        # token has a positive probability.
        limit_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        token_B1 = torch.searchsorted(
            cumulative_BV, torch.minimum(number_B1 * total_B1, limit_B1), right=True
        )
        token_B1 = token_B1.clamp(max=scores_BV.shape[1] - 1)
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B1, 0.0)

    def _next_numbers(self, device: torch.device) -> torch.Tensor:
        """Return (B, 1) float64 in [0, 1): the next random number of each row."""
        if not self._numbers:
            table = [
                torch.rand(TOKENS_PER_DRAW, generator=g, dtype=torch.float64)
                for g in self._generators
            ]
            self._numbers = list(torch.stack(table, dim=1).to(device))
        return self._numbers.pop(0).unsqueeze(1)

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Add this object as the last logits processor, and run transformers' own sampling loop.
        This method is passed to ``generate(custom_generate=...)`` (transformers 5.17).
        """
        last_processors = [self] if generation_config.do_sample else []
        is_real = model_kwargs["attention_mask"].bool()
        first_processors = [
            PaddingFreePenalty(processor, is_real)
            if type(processor) is RepetitionPenaltyLogitsProcessor
            else processor
            for processor in logits_processor
        ]
        return model._sample(
            input_ids,
            LogitsProcessorList([*first_processors, *last_processors]),
            stopping_criteria,
            generation_config,
            **model_kwargs,
        )


class PaddingFreePenalty(LogitsProcessor):  # type: ignore[misc]  # as above
    """The repetition penalty of transformers without its effect on padding.

    Shorter prompts are padded to the longest prompt of the batch. The penalty of transformers 5.17
    also applies to the padding token, which often is the token that ends a completion. So the
    completion of a row would depend on the other prompts of the batch. ``real_BP`` (B, P) bool is
    False on the padding at the left of the prompts.
    """

    def __init__(self, penalty: LogitsProcessor, real_BP: torch.Tensor) -> None:
        self._penalty, self._real_BP = penalty, real_BP

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Return the penalized (B, V) scores. For the penalty, each padding token is replaced by
        the last token of the prompt. This token is penalized anyway, so padding has no effect.
        """
        width = self._real_BP.shape[1]
        last_B1 = input_ids[:, width - 1 : width]
        prompt_BP = torch.where(self._real_BP, input_ids[:, :width], last_B1)
        ids = torch.cat([prompt_BP, input_ids[:, width:]], dim=1)
        scores: torch.Tensor = self._penalty(ids, scores_BV)
        return scores


class StopStrings(StoppingCriteria):  # type: ignore[misc]  # as above
    """The stopping criterion for stop strings. For each row it records the number of tokens at
    which the row reached a stop string. The later tokens of this row are padding.

    The class needs ``tokenizer`` as an argument. If ``generate`` gets ``custom_generate``,
    transformers 5.17 does not pass the argument ``tokenizer`` of ``generate`` on.

    Raises:
        ConfigValueError: transformers does not support these stop strings or this tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | Sequence[str]) -> None:
        strings = [stop] if isinstance(stop, str) else list(stop)
        try:
            self._criterion = StopStringCriteria(tokenizer, strings)
        except ValueError as problem:
            raise ConfigValueError(
                f"transformers cannot stop at {strings}: {first_line(problem)}",
                where="sampling",
                fix="remove the stop strings, or load the model with `fast_inference=True`",
            ) from problem
        self._end_B: torch.Tensor | None = None
        self._width = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return (B) bool: True for rows that end in a stop string."""
        done_B: torch.Tensor = self._criterion(input_ids, scores, **kwargs)
        end_B = torch.zeros_like(input_ids[:, 0]) if self._end_B is None else self._end_B
        self._width = input_ids.shape[1]
        self._end_B = torch.where(done_B & (end_B == 0), self._width, end_B)
        return done_B

    def lengths(self, tokens: int) -> list[int]:
        """Return the number of tokens of each completion, up to and including its stop string.
        ``tokens`` is the padded length of the completions. A completion without a stop string has
        this length.
        """
        if self._end_B is None:
            return []
        ends = self._end_B.tolist()
        return [end - (self._width - tokens) if end else tokens for end in ends]


def supports_row_seeds(config: GenerationConfig) -> bool:
    """Return True if ``config`` requests plain sampling or greedy decoding, which are the modes
    that ``generate_with_row_seeds`` supports.
    """
    mode = config.get_generation_mode()
    return mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)


def generate_with_row_seeds(
    model: PreTrainedModel, inputs: dict[str, Any], config: GenerationConfig, seeds: Sequence[int]
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Call ``model.generate`` with one seed per row of the output.

    ``inputs`` has input_ids and attention_mask, both (B, P) int64, and other arguments of
    ``generate``. Returns the sequences (B, P + T) and, if ``config.output_scores`` is True, T
    tensors (B, V) of processed scores. Raises ValueError if transformers rejects an option.
    """
    is_sampling = config.get_generation_mode() == GenerationMode.SAMPLE
    sampler = RowSampler(seeds, keep_scores=bool(config.output_scores))
    output = model.generate(**inputs, generation_config=config, custom_generate=sampler.decode)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    if is_sampling:
        return sequences, sampler.scores
    return sequences, getattr(output, "scores", None) or ()


def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    generate_kwargs: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Draw one completion per seed. Returns the completions (B, T) and, if ``config`` requests
    scores, T tensors (B, V) of processed scores.

    Prompts are padded on the left with ``config.pad_token_id``. ``generate_kwargs`` has further
    arguments of ``generate``. The checkpoint's own generation config is ignored, so options that
    ``config`` does not set are off. Afterwards the checkpoint's config, the random generators and
    the model's training mode are restored. Raises ValueError if transformers rejects an option.
    """
    width = max(len(prompt) for prompt in prompts)
    pad = config.pad_token_id
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    inputs = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
        **(generate_kwargs or {}),
    }
    with (
        _evaluation_mode(model),
        _restored_generators(model.device),
        _without_checkpoint_defaults(model),
    ):
        sequences, scores = generate_with_row_seeds(model, inputs, config, seeds)
    return sequences[:, width:], scores


def max_completion_lengths(
    prompts: Sequence[Sequence[int]], row_count: int, max_length: int
) -> list[int]:
    """Return the maximum number of tokens of each of ``row_count`` completions. A prompt and its
    completion may have at most ``max_length`` tokens together. Each prompt has the same number of
    completions, in consecutive rows.
    """
    rows_per_prompt = row_count // len(prompts)
    return [max(1, max_length - len(prompt)) for prompt in prompts for _ in range(rows_per_prompt)]


def truncate_completions(
    sampled_BT: torch.Tensor,
    end_ids: Collection[int],
    stop_strings: StopStrings | None = None,
    max_lengths: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the completions, each without the tokens after its end. A completion ends after the
    first token that is in ``end_ids``, after a stop string, or at its maximum length, whichever
    comes first. ``max_lengths`` has the maximum length of each completion, in tokens. vLLM ends
    completions in the same way at the maximum length.
    """
    rows: list[list[int]] = sampled_BT.tolist()
    if max_lengths is not None:
        rows = [row[:length] for row, length in zip(rows, max_lengths, strict=True)]
    if stop_strings is not None:
        lengths = stop_strings.lengths(sampled_BT.shape[1])
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    sizes = (next((i + 1 for i, token in enumerate(r) if token in end_ids), len(r)) for r in rows)
    return [row[:size] for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set ``model`` to evaluation mode within the block. Evaluation mode has no dropout and no
    gradient checkpointing. Gradient checkpointing would disable the KV cache.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _without_checkpoint_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the checkpoint's generation config within the block.

    If the user did not set an option, transformers takes its value from that config. So, for
    example, a no_repeat_ngram_size of the checkpoint would change the distribution that tokens are
    sampled from.
    """
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = base_model.generation_config
    without_defaults = copy.deepcopy(original)
    for name in KEYWORDS["transformers"].keys() - _KEPT_DEFAULTS:
        setattr(without_defaults, name, None)
    base_model.generation_config = without_defaults
    try:
        yield
    finally:
        base_model.generation_config = original


@contextmanager
def _restored_generators(device: torch.device) -> Iterator[None]:
    """Restore the global random generators after the block. transformers' sampling loop draws from
    these generators, although this module chooses the tokens with its own generators.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
