"""Tables of the sampling keywords of both engines (vLLM and transformers). The tables state for
each keyword which values are valid, how the keyword changes the sampled distribution, and which
field of GRPOConfig has the same meaning.

The rules on ``grpo.generation_kwargs``, the drop-in trainer and the engines all use these tables,
so they refuse the same keywords with the same messages. A test in tests/contract compares the
tables with the fields of vLLM's SamplingParams and transformers' GenerationConfig.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from toolkit.base.did_you_mean import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Engine = Literal["vllm", "transformers"]
ENGINE_NAMES: dict[Engine, str] = {"vllm": "vLLM", "transformers": "Hugging Face generation"}


class Effect(StrEnum):
    """How a keyword changes the distribution from which tokens are sampled."""

    NONE = "none"
    REPRODUCED = "reproduced"
    """The training pass applies the keyword too, so it scores the sampled distribution."""
    NOT_REPRODUCED = "not reproduced"
    """The training pass ignores the keyword, so it scores another distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyword:
    """A sampling keyword of one engine (vLLM or transformers)."""

    name: str
    expected: str
    """A text that says what the value must be: ``a whole number, at least 0``."""
    accepts: Callable[[Any], bool]
    effect: Effect = Effect.NONE
    field: str | None = None
    """The field of GRPOConfig with the same meaning."""
    owned: str | None = None
    """Why only the toolkit may set the keyword; None if a user may set it."""
    unused: str | None = None
    """Why the keyword has no effect or cannot work here; None if it works."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a sampling keyword cannot be used. Each ``kind`` has a rule that reports it."""

    kind: Literal["owned", "unread", "field", "value"]
    message: str
    fix: str
    suggestion: str | None = None
    """The keyword of the same engine that the user probably meant."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _as_items(value: object) -> Iterable[Any] | None:
    return value if isinstance(value, (list, tuple)) else None


def _all(value: object, is_valid: Callable[[Any], bool]) -> bool:
    items = _as_items(value)
    return items is not None and all(is_valid(item) for item in items)


def _is_set(value: object) -> bool:
    return value is not None


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _are_texts(value: object) -> bool:
    return isinstance(value, str) or _all(value, lambda one: isinstance(one, str))


def _are_tokens(value: object) -> bool:
    return _all(value, _is_token)


def _are_token_lists(value: object) -> bool:
    return _all(value, _are_tokens)


def _are_biases(value: object) -> bool:
    if not hasattr(value, "items"):
        return False
    return all(str(token).isdecimal() and _is_number(bias) for token, bias in value.items())


def _at_least(low: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number, at least {low}", lambda value: _is_integer(value) and value >= low


def _between(low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    return f"a number from {low} to {high}", lambda v: _is_number(v) and low <= v <= high


_ANY = ("a value", _is_set)
_FLAG = ("true or false", _is_flag)
_TEXTS = ("a string or a list of strings", _are_texts)
_TOKENS = ("a list of token ids", _are_tokens)
_MAPPING = ("a mapping", lambda value: hasattr(value, "items") or hasattr(value, "regex"))
_FACTOR = ("a number above 0", lambda value: _is_number(value) and value > 0)
_TOP_P = ("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)


def _keywords(effect: Effect, **takes: tuple[str, Callable[[Any], bool]]) -> dict[str, Keyword]:
    return {
        name: Keyword(name=name, expected=words, accepts=accepts, effect=effect)
        for name, (words, accepts) in takes.items()
    }


def _field_keywords(**fields: tuple[str, tuple[str, Callable[[Any], bool]]]) -> dict[str, Keyword]:
    return {
        name: Keyword(
            name=name, expected=words, accepts=accepts, effect=Effect.REPRODUCED, field=field
        )
        for name, (field, (words, accepts)) in fields.items()
    }


def _owned(**reasons: str) -> dict[str, Keyword]:
    return {
        name: Keyword(name=name, expected=_ANY[0], accepts=_is_set, owned=reason)
        for name, reason in reasons.items()
    }


def _unused(reason: str, names: str) -> dict[str, Keyword]:
    return {
        name: Keyword(name=name, expected=_ANY[0], accepts=_is_set, unused=reason)
        for name in names.split()
    }


_DISTRIBUTION = {
    "temperature": ("temperature", _FACTOR),
    "top_p": ("top_p", _TOP_P),
    "top_k": ("top_k", _at_least(-1)),
    "min_p": ("min_p", _between(0, 1)),
    "repetition_penalty": ("repetition_penalty", _FACTOR),
}
_COMPLETION = ("max_completion_length", _at_least(1))

_VLLM: dict[str, Keyword] = {
    **_field_keywords(**_DISTRIBUTION, max_tokens=_COMPLETION),
    **_keywords(
        Effect.REPRODUCED, presence_penalty=_between(-2, 2), frequency_penalty=_between(-2, 2)
    ),
    **_keywords(
        Effect.NOT_REPRODUCED,
        min_tokens=_at_least(0),
        logit_bias=("a mapping of token ids to numbers", _are_biases),
        allowed_token_ids=_TOKENS,
        bad_words=_TEXTS,
        structured_outputs=_MAPPING,
        thinking_token_budget=_at_least(-1),
        extra_args=_MAPPING,
    ),
    **_keywords(
        Effect.NONE,
        stop=_TEXTS,
        stop_token_ids=_TOKENS,
        ignore_eos=_FLAG,
        skip_reading_prefix_cache=_FLAG,
    ),
    **_owned(
        n="num_generations sets the number of completions per prompt",
        seed="each completion has its own seed, which is derived from the run's seed",
        logprobs=(
            "if it were above 1, TRL would use the log-probability of the most likely token in "
            "place of that of the sampled token"
        ),
        detokenize="the toolkit turns it on only if a stop string requires decoded text",
        flat_logprobs="the toolkit can read log-probabilities in only one layout",
        output_kind="the toolkit reads rollouts only when they are complete",
        skip_clone="each request must have its own copy of the parameters",
        output_text_buffer_length="vLLM computes this value from the stop strings",
    ),
    **_unused(
        "this keyword changes only the text of rollouts, but the toolkit reads their token ids",
        "skip_special_tokens spaces_between_special_tokens include_stop_str_in_output",
    ),
    **_unused(
        "the toolkit reads only the log-probabilities of the sampled tokens",
        "prompt_logprobs prompt_logprob_token_ids prompt_logprob_start logprob_token_ids",
    ),
    **_unused("the toolkit reads rollouts only when they are complete", "stream_interval"),
    **_unused("the engine is created without support for watermarks", "watermarking"),
    **_unused("its value must be an object of vLLM", "repetition_detection"),
    **_unused(
        "this keyword is for debugging vLLM, not for training",
        "routed_experts_prompt_start trace_decode_token_ids",
    ),
}

_TRANSFORMERS: dict[str, Keyword] = {
    **_field_keywords(
        **_DISTRIBUTION,
        max_new_tokens=_COMPLETION,
        cache_implementation=("cache_implementation", _ANY),
    ),
    **_keywords(
        Effect.NOT_REPRODUCED,
        min_length=_at_least(0),
        min_new_tokens=_at_least(0),
        top_h=_TOP_P,
        typical_p=_TOP_P,
        epsilon_cutoff=_between(0, 1),
        eta_cutoff=_between(0, 1),
        no_repeat_ngram_size=_at_least(0),
        bad_words_ids=("a list of lists of token ids", _are_token_lists),
        sequence_bias=("a list or a mapping", lambda v: _all(v, _is_set) or hasattr(v, "items")),
        suppress_tokens=_TOKENS,
        begin_suppress_tokens=_TOKENS,
        forced_bos_token_id=_at_least(0),
        forced_eos_token_id=("one or more token ids", lambda v: _is_token(v) or _are_tokens(v)),
        exponential_decay_length_penalty=(
            "a list of a whole number and a number",
            lambda value: _all(value, _is_number) and len(value) == 2,
        ),
        guidance_scale=_FACTOR,
        watermarking_config=_MAPPING,
    ),
    **_keywords(
        Effect.NONE,
        stop_strings=_TEXTS,
        max_time=_FACTOR,
        use_cache=_FLAG,
        prefill_chunk_size=_at_least(1),
        remove_invalid_values=_FLAG,
        renormalize_logits=_FLAG,
    ),
    **_owned(
        num_return_sequences="num_generations sets the number of completions per prompt",
        do_sample="training always samples its completions",
        max_length="max_completion_length sets the limit in tokens",
        pad_token_id="the tokenizer determines this token",
        bos_token_id="the tokenizer determines this token",
        eos_token_id="the end tokens come from the tokenizer and the model",
        return_dict_in_generate="the toolkit reads rollouts in one fixed layout",
        output_scores="the toolkit reads rollouts in one fixed layout",
        output_logits="the toolkit reads rollouts in one fixed layout",
        output_attentions="the toolkit reads rollouts in one fixed layout",
        output_hidden_states="the toolkit reads rollouts in one fixed layout",
        disable_compile="TRL generates without torch.compile",
        compile_config="TRL generates without torch.compile",
        continuous_batching_config="grpo.use_transformers_continuous_batching sets it",
    ),
    **_unused(
        "completions are sampled, not found by beam search",
        "num_beams num_beam_groups length_penalty early_stopping diversity_penalty constraints"
        " force_words_ids penalty_alpha dola_layers low_memory",
    ),
    **_unused(
        "a rollout has no assistant model",
        "is_assistant num_assistant_tokens num_assistant_tokens_schedule use_mtp speculation_type"
        " assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size"
        " assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight",
    ),
    **_unused(
        "this keyword is only for models with an encoder",
        "encoder_repetition_penalty encoder_no_repeat_ngram_size decoder_start_token_id",
    ),
    **_unused("rollouts use transformers' own cache", "cache_config max_cache_len"),
    **_unused("generation receives prompts as token ids", "token_healing"),
}  # fmt: skip

KEYWORDS: Mapping[Engine, Mapping[str, Keyword]] = {"vllm": _VLLM, "transformers": _TRANSFORMERS}

OWNED_KEYWORDS: Mapping[str, str] = {
    name: one.owned for name, one in _VLLM.items() if one.owned is not None
}
"""The keywords that ``generation_kwargs`` must not set with vLLM, and the reasons."""

_SYNONYMS = (
    ("max_tokens", "max_new_tokens"),
    ("min_tokens", "min_new_tokens"),
    ("stop", "stop_strings"),
    ("n", "num_return_sequences"),
    ("logit_bias", "sequence_bias"),
    ("bad_words", "bad_words_ids"),
    ("stop_token_ids", "eos_token_id"),
)


def find_problem(
    name: str, value: object, engine: Engine, *, multi_turn: bool = False
) -> Problem | None:
    """Check one entry of ``generation_kwargs``: the sampling keyword ``name`` and its ``value``.
    Return why the entry is refused; None if it is accepted. ``engine`` is the engine of the run.
    ``multi_turn`` says whether a completion can have several turns (tools). If so, the engine's own
    length limit (such as ``max_tokens``) is accepted as the limit of one turn.
    """
    keyword = KEYWORDS[engine].get(name)
    if keyword is None:
        return _unknown(name, engine)
    if keyword.owned is not None:
        return Problem("owned", f"{name} is set by the toolkit: {keyword.owned}", f"remove {name}")
    if keyword.unused is not None:
        return Problem("unread", f"{name} has no effect here: {keyword.unused}", f"remove {name}")
    if keyword.field is not None and not (multi_turn and keyword.field == _COMPLETION[0]):
        return Problem(
            "field",
            f"{name} has the same meaning as grpo.{keyword.field}, but training reads only "
            f"grpo.{keyword.field}",
            f"set grpo.{keyword.field} instead",
        )
    if not keyword.accepts(value):
        return Problem(
            "value", f"{_shown(value)} is not {keyword.expected}", f"use {keyword.expected}"
        )
    return None


def unknown_keyword_problem(name: str, engine: Engine) -> Problem | None:
    """Return why ``engine`` does not have the sampling keyword ``name``; None if it does."""
    return None if name in KEYWORDS[engine] else _unknown(name, engine)


def _unknown(name: str, engine: Engine) -> Problem:
    other: Engine = "transformers" if engine == "vllm" else "vllm"
    other_keyword = KEYWORDS[other].get(name)
    if other_keyword is not None:
        message = (
            f"{name} is a keyword of {ENGINE_NAMES[other]}; {ENGINE_NAMES[engine]} does not read it"
        )
        if other_keyword.field is not None:
            return Problem("unread", message, f"set grpo.{other_keyword.field} instead")
        synonym = next((t for pair in _SYNONYMS for t in pair if name in pair and t != name), None)
        if synonym is not None and find_problem(synonym, None, engine) is not None:
            candidate = KEYWORDS[engine][synonym]
            if candidate.owned is None and candidate.unused is None:
                fix = f"use {synonym}, the name of this keyword in {ENGINE_NAMES[engine]}"
                return Problem("unread", message, fix, synonym)
        return Problem("unread", message, f"remove {name}")
    message = f"{name} is not a sampling keyword of {ENGINE_NAMES[engine]}"
    nearest_name = nearest(name, list(KEYWORDS[engine])) or nearest(name, list(KEYWORDS[other]))
    if nearest_name is None:
        return Problem("unread", message, f"remove {name}")
    keyword = KEYWORDS[engine].get(nearest_name) or KEYWORDS[other][nearest_name]
    if keyword.field is not None:
        return Problem("unread", message, f"did you mean grpo.{keyword.field} ({nearest_name})?")
    if nearest_name not in KEYWORDS[engine] or keyword.owned or keyword.unused:
        return Problem("unread", message, f"remove {name}")
    return Problem("unread", message, f"did you mean {nearest_name}?", nearest_name)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unreproduced_keywords(keywords: Mapping[str, Any], engine: Engine) -> Iterator[str]:
    """Yield those names in ``keywords`` that change the sampled distribution in a way that the
    training pass does not reproduce.
    """
    for name in keywords:
        keyword = KEYWORDS[engine].get(name)
        if keyword is not None and keyword.effect is Effect.NOT_REPRODUCED:
            yield name


def describe_mismatch(engine: Engine) -> str:
    """Return a text that says how training is affected if completions are sampled from another
    distribution than the one that the training pass computes.
    """
    if engine == "vllm":
        return (
            "the engine's log-probabilities are those of the restricted distribution, but "
            "training scores the unrestricted one. Each importance weight then includes the "
            "probability that was cut off, and over a long completion the product of the weights "
            "may reach 0"
        )
    return (
        "completions are sampled from the restricted distribution, but training scores the "
        "unrestricted one. Without the vLLM engine no importance weight corrects the difference"
    )
