"""Hugging Face generation in which every row draws from a seed of its own.

transformers draws a whole batch from one global generator: what a row gets hangs on its place among
the others. A batch may be cut over ranks or halved where memory runs out, so here each row brings
its own generator, one number a token, and takes the token at which the probabilities add up to it.
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
from toolkit.config.sampling_keywords import KEYWORDS, Effect

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from transformers import GenerationConfig

AHEAD = 32
"""Tokens whose numbers are drawn at once: one copy to the GPU, not one a token."""


class RowDraws(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types that strict mode can use
    """The last of the logits processors: of each row it leaves the one token that the row draws.

    ``scores`` keeps what came in, a (B, V) tensor a token, if asked to.
    """

    def __init__(self, seeds: Sequence[int], *, keep_scores: bool) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._ahead: list[torch.Tensor] = []
        self._keep = keep_scores
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """(B, V) scores: 0 for the token drawn, -inf for the others."""
        del input_ids
        if self._keep:
            self.scores.append(scores_BV)
        number_B1 = self._next(scores_BV.device)
        heights_BV = torch.softmax(scores_BV.double(), -1).cumsum(-1)
        total_B1 = heights_BV[:, -1:].contiguous()
        # Below the total, also once rounded: the token found is one with a probability.
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        token_B1 = torch.searchsorted(
            heights_BV, torch.minimum(number_B1 * total_B1, below_B1), right=True
        )
        token_B1 = token_B1.clamp(max=scores_BV.shape[1] - 1)
        drawn_BV = torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B1, 0.0)
        # What is no number is transformers' to refuse.
        return torch.where(total_B1.isfinite(), drawn_BV, scores_BV)

    def _next(self, device: torch.device) -> torch.Tensor:
        """(B, 1) float64 in [0, 1): the next number of each row."""
        if not self._ahead:
            table = [torch.rand(AHEAD, generator=g, dtype=torch.float64) for g in self._generators]
            self._ahead = list(torch.stack(table, dim=1).to(device))
        return self._ahead.pop(0).unsqueeze(1)

    def decode(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate(custom_generate=...)`` calls (transformers 5.17): its own sampling loop,
        with these draws behind its processors where it draws.
        """
        own = [self] if generation_config.do_sample else []
        real = model_kwargs["attention_mask"].bool()
        before = [
            PromptPenalty(one, real) if type(one) is RepetitionPenaltyLogitsProcessor else one
            for one in logits_processor
        ]
        return model._sample(
            input_ids,
            LogitsProcessorList([*before, *own]),
            stopping_criteria,
            generation_config,
            **model_kwargs,
        )


class PromptPenalty(LogitsProcessor):  # type: ignore[misc]  # as above
    """transformers' repetition penalty, which also punishes the padding token of shorter prompts
    (5.17): often that is the token that ends a completion, so a row would depend on its neighbours.

    ``real_BP`` (B, P) bool: False on the padding left of the prompts.
    """

    def __init__(self, penalty: LogitsProcessor, real_BP: torch.Tensor) -> None:
        self._penalty, self._real_BP = penalty, real_BP

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """(B, V) scores; the last token of the prompt is in place of padding."""
        width = self._real_BP.shape[1]
        last_B1 = input_ids[:, width - 1 : width]
        prompt_BP = torch.where(self._real_BP, input_ids[:, :width], last_B1)
        ids = torch.cat([prompt_BP, input_ids[:, width:]], dim=1)
        scores: torch.Tensor = self._penalty(ids, scores_BV)
        return scores


class StopAt(StoppingCriteria):  # type: ignore[misc]  # as above
    """Stop strings, and how long a row was when it met one: what follows in it is padding.

    transformers drops the tokenizer of ``generate`` where it decodes by a callable (5.17).

    Raises:
        ConfigValueError: texts or a tokenizer that transformers cannot stop at.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str]) -> None:
        strings = [stop] if isinstance(stop, str) else list(stop)
        try:
            self._strings = StopStringCriteria(tokenizer, strings)
        except ValueError as problem:
            raise ConfigValueError(
                f"transformers cannot stop at {strings}: {first_line(problem)}",
                where="sampling",
                fix="leave the stop strings out, or load with fast_inference=True",
            ) from problem
        self._met_B: torch.Tensor | None = None
        self._width = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """(B) bool: rows that end in a stop string."""
        done_B: torch.Tensor = self._strings(input_ids, scores, **more)
        met_B = torch.zeros_like(input_ids[:, 0]) if self._met_B is None else self._met_B
        self._width = input_ids.shape[1]
        self._met_B = torch.where(done_B & (met_B == 0), self._width, met_B)
        return done_B

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each completion, at most ``tokens``, the longest."""
        if self._met_B is None:
            return []
        met = self._met_B.tolist()
        return [one - (self._width - tokens) if one else tokens for one in met]


def draws_by_row(config: GenerationConfig) -> bool:
    """True where ``generate_rows`` can draw: plain sampling, or greedy, which draws nothing."""
    mode = config.get_generation_mode()
    return mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)


def generate_rows(
    model: Any, inputs: dict[str, Any], config: GenerationConfig, seeds: Sequence[int]
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """``model.generate`` with a seed for each row that comes out.

    ``inputs``: input_ids and attention_mask, both (B, P) int64, and what else ``generate`` takes.
    Returns the sequences (B, P + T) and, if ``config.output_scores``, T tensors (B, V) of processed
    scores. Raises ValueError where transformers refuses an option.
    """
    sampled = config.get_generation_mode() == GenerationMode.SAMPLE
    draws = RowDraws(seeds, keep_scores=bool(config.output_scores))
    output = model.generate(**inputs, generation_config=config, custom_generate=draws.decode)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    if sampled:
        return sequences, draws.scores
    return sequences, getattr(output, "scores", None) or ()


def draw(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    more: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """A completion for each seed, rows (B, T), and the scores that ``config`` asks for, T x (B, V).

    Prompts are padded on the left with ``config.pad_token_id``; ``more`` goes to ``generate``.
    Options that ``config`` leaves out are off, whatever the checkpoint's own generation config
    says. That config, the generators and the model's training mode are left as they were. Raises
    ValueError.
    """
    width = max(len(prompt) for prompt in prompts)
    pad = config.pad_token_id
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    inputs = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
        **(more or {}),
    }
    with _inference(model), _kept_generators(model.device), _without_defaults(model):
        sequences, scores = generate_rows(model, inputs, config, seeds)
    return sequences[:, width:], scores


def room(prompts: Sequence[Sequence[int]], rows: int, longest: int) -> list[int]:
    """Tokens that each of ``rows`` completions may have, where prompt and completion together have
    at most ``longest``. Equal numbers of neighbouring rows belong to each prompt.
    """
    each = rows // len(prompts)
    return [max(1, longest - len(prompt)) for prompt in prompts for _ in range(each)]


def cut(
    sampled_BT: torch.Tensor,
    ends: Collection[int],
    stop: StopAt | None = None,
    most: Sequence[int] | None = None,
) -> list[list[int]]:
    """Each row up to and with the first token of ``ends``, or the last of a stop string; at most
    ``most`` tokens of each row, which is what vLLM does at the end of its context.
    """
    rows: list[list[int]] = sampled_BT.tolist()
    if most is not None:
        rows = [row[:length] for row, length in zip(rows, most, strict=True)]
    if stop is not None:
        lengths = stop.lengths(sampled_BT.shape[1])
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    sizes = (next((i + 1 for i, token in enumerate(r) if token in ends), len(r)) for r in rows)
    return [row[:size] for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode for the while: dropout off, and no gradient checkpointing, which drops the
    cache.
    """
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """transformers fills what a generation config leaves out from the checkpoint's: a
    no_repeat_ngram_size that nobody asked for would be part of the policy. Those are off here.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.generation_config
    bare = copy.deepcopy(before)
    for name, keyword in KEYWORDS["transformers"].items():
        if keyword.effect is not Effect.NONE:
            setattr(bare, name, None)
    inner.generation_config = bare
    try:
        yield
    finally:
        inner.generation_config = before


@contextmanager
def _kept_generators(device: torch.device) -> Iterator[None]:
    """transformers' loop draws from the global generators, to no effect: they are put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
