"""Generate with Hugging Face transformers, with the interface of ``rollout_engine.RolloutEngine``.

Evaluation and ``fast_generate`` use this module for a model without vLLM. Training uses
``train.rollout.sampler.TransformersGeneration`` instead.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from toolkit.base.errors import ConfigTypeError, ConfigValueError, UnsupportedError, first_line
from toolkit.config.sampling_keywords import unknown_keyword_problem
from toolkit.engine.hf_sampling import (
    StopStrings,
    max_completion_lengths,
    sample_completions,
    truncate_completions,
)
from toolkit.engine.rollout_request import Rollout, check_prompts, request_seed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.config.sampling_keywords import Engine as SamplerName
    from toolkit.engine.rollout_request import Sampling

WHERE = "sampling"


class TransformersEngine:
    """An engine that samples from ``model`` (transformers or PEFT) itself. It always uses the
    current weights, so an adapter does not have to be published.

    ``end_ids`` are the token ids that end a completion. ``pad_id`` is the token id that pads
    shorter prompts on the left. ``max_model_len`` is in tokens (prompt plus completion). If it is
    None, the value in the model's config is used.
    """

    sampler_name: SamplerName = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        end_ids: Collection[int],
        max_model_len: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model = model
        self._pad_id, self._end_ids, self._tokenizer = pad_id, sorted(end_ids), tokenizer
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_model_len = max_model_len or longest or 2**31

    def publish(self, peft_model: PreTrainedModel, name: str = "default") -> None:
        """Check that ``peft_model`` is the model that this engine samples from. No values are
        copied, because the trained model itself generates.

        Raises:
            ConfigValueError: ``peft_model`` is another model.
        """
        if peft_model is not self.model:
            raise ConfigValueError(
                f"adapter {name!r} belongs to a model that this engine does not sample from",
                where="publish",
                fix="call `publish` with the model that the engine was created with",
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        adapter: bool | str = True,
        rows: Sequence[int] | None = None,
    ) -> Rollout:
        """Draw ``sampling.n`` completions of each prompt (token ids). The random numbers of a
        completion depend only on ``seed`` and the row of the completion in the batch.
        ``rollout_engine.RolloutEngine`` explains ``rows``.

        The log-probabilities are those of the distribution that tokens are sampled from (after
        temperature, top-k, top-p, min-p and penalties). If ``adapter`` is False, tokens are sampled
        from the base model. Afterwards the caller's random generators and the model's training mode
        are restored.

        Raises:
            ConfigValueError: a prompt is too long, or transformers rejects a value.
            ConfigTypeError: ``sampling.extra`` has a keyword that transformers does not support.
            UnsupportedError: structured outputs are requested, which need the vLLM engine.
        """
        check_prompts(prompts, sampling.max_tokens, self.max_model_len)
        if not prompts:
            without_logprobs = sampling.logprobs is None
            return Rollout(
                [], [], None if without_logprobs else [], None if without_logprobs else []
            )
        config, stop_strings = self._generation_config(sampling)
        max_lengths = max_completion_lengths(prompts, len(prompts) * sampling.n, self.max_model_len)
        config.max_new_tokens = min(config.max_new_tokens, max(max_lengths))
        generate_kwargs = (
            {}
            if stop_strings is None
            else {"stopping_criteria": StoppingCriteriaList([stop_strings])}
        )
        rows = range(0, len(prompts) * sampling.n, sampling.n) if rows is None else rows
        seeds = [request_seed(seed, row + k) for row in rows for k in range(sampling.n)]
        keeps_adapter = adapter or not hasattr(self.model, "disable_adapter")
        adapter_context = nullcontext() if keeps_adapter else self.model.disable_adapter()
        with adapter_context:
            try:
                sampled_BT, scores = sample_completions(
                    self.model, prompts, config, seeds, generate_kwargs
                )
            except ValueError as error:
                raise _rejected_options_error(error) from error
        end_ids = {*self._end_ids, *sampling.stop_token_ids}
        completions = truncate_completions(sampled_BT, end_ids, stop_strings, max_lengths)
        return _build_rollout(prompts, completions, sampled_BT, scores, sampling)

    def sleep(self) -> None:
        """Do nothing. This engine has no memory of its own to release."""

    def wake(self) -> None:
        """Do nothing, because ``sleep`` releases no memory."""

    def close(self) -> None:
        """Do nothing, because the model belongs to the caller."""

    def _generation_config(self, sampling: Sampling) -> tuple[GenerationConfig, StopStrings | None]:
        """Convert ``sampling`` to transformers' generation config, and return the config and the
        stopping criterion for stop strings (None without stop strings).
        """
        if sampling.structured_outputs_regex is not None or "structured_outputs" in sampling.extra:
            raise UnsupportedError(
                "structured outputs need the vLLM engine",
                where=WHERE,
                fix="load the model with `fast_inference=True`, or remove the structured outputs",
            )
        extra = dict(sampling.extra)
        stop = extra.pop("stop", None) or extra.pop("stop_strings", None)
        for name in extra:
            problem = unknown_keyword_problem(name, self.sampler_name)
            if problem is not None:
                raise ConfigTypeError(problem.message, where=WHERE, fix=problem.fix)
        _check_ranges(sampling)
        greedy = sampling.temperature == 0.0
        sampling_keywords: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if not greedy:
            sampling_keywords = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": max(sampling.top_k, 0),  # vLLM writes "off" as -1 or 0
                "min_p": sampling.min_p or None,
            }
        keywords = {
            **sampling_keywords,
            "repetition_penalty": sampling.repetition_penalty,
            "num_return_sequences": sampling.n,
            "max_new_tokens": sampling.max_tokens,
            "eos_token_id": sorted({*self._end_ids, *sampling.stop_token_ids}),
            "pad_token_id": self._pad_id,
            "return_dict_in_generate": True,
            "output_scores": sampling.logprobs is not None,
        }
        try:
            config = GenerationConfig(**{**keywords, **extra})
        except ValueError as error:
            raise _rejected_options_error(error) from error
        return config, StopStrings(self._tokenizer, stop) if stop else None


def _build_rollout(
    prompts: Sequence[Sequence[int]],
    completions: list[list[int]],
    sampled_BT: torch.Tensor,
    scores: Sequence[torch.Tensor],
    sampling: Sampling,
) -> Rollout:
    """Build the rollout. ``completions`` are the token ids of each completion, up to and including
    the token that ended it. Log-probabilities are shortened to the same lengths.
    """
    repeated = [list(prompt) for prompt in prompts for _ in range(sampling.n)]
    if sampling.logprobs is None:
        return Rollout(repeated, completions, None, None)
    lengths = [len(row) for row in completions]
    values, tokens = _top_logprobs(scores, sampled_BT, sampling.logprobs)
    return Rollout(
        repeated,
        completions,
        [row[:size] for row, size in zip(values, lengths, strict=True)],
        [row[:size] for row, size in zip(tokens, lengths, strict=True)],
    )


def _rejected_options_error(error: ValueError) -> ConfigValueError:
    return ConfigValueError(
        f"transformers rejects the sampling options: {first_line(error)}", where=WHERE
    )


def _check_ranges(sampling: Sampling) -> None:
    """Reject values that transformers would accept and ignore, for example a top_p of 7."""
    in_range = {
        "temperature": sampling.temperature >= 0,
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= -1,
        "min_p": sampling.min_p is None or 0 <= sampling.min_p <= 1,
        "repetition_penalty": sampling.repetition_penalty > 0,
    }
    for name, is_valid in in_range.items():
        if not is_valid:
            raise ConfigValueError(f"{name}={getattr(sampling, name)} is out of range", where=WHERE)


def _top_logprobs(
    scores: Sequence[torch.Tensor], sampled_BT: torch.Tensor, count: int
) -> tuple[list[list[list[float | None]]], list[list[list[int]]]]:
    """Return log-probabilities and token ids, both as nested lists [sequence][position][index].

    ``scores`` are T tensors (B, V) of processed logits. If ``count`` is 0, a position has only the
    sampled token. Otherwise it has the ``count`` most likely tokens, the most likely one first, and
    then the sampled token if it is not one of them.
    """
    values: list[list[list[float | None]]] = [[] for _ in range(sampled_BT.shape[0])]
    tokens: list[list[list[int]]] = [[] for _ in range(sampled_BT.shape[0])]
    for position, logits_BV in enumerate(scores):
        logps_BV = torch.log_softmax(logits_BV.float(), -1)
        sampled_B1 = sampled_BT[:, position : position + 1]
        sampled_logps = logps_BV.gather(1, sampled_B1)[:, 0].tolist()
        top = torch.topk(logps_BV, count, dim=-1) if count else None
        for row, token in enumerate(sampled_B1[:, 0].tolist()):
            logp_of_token: dict[int, float] = {}
            if top is not None:
                ids = top.indices[row].tolist()
                logp_of_token = dict(zip(ids, top.values[row].tolist(), strict=True))
            logp_of_token.setdefault(token, sampled_logps[row])
            values[row].append(list(logp_of_token.values()))
            tokens[row].append(list(logp_of_token))
    return values, tokens
