"""Read the prompts and options of ``fast_generate``, and create its results. The same code is used
for vLLM and for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigTypeError, ConfigValueError
from toolkit.engine.rollout_request import Sampling
from toolkit.policy.load_arguments import did_you_mean_text

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedTokenizerBase

    from toolkit.engine.rollout_request import Rollout

WHERE = "fast_generate"

COMMON_OPTIONS = (
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "stop",
    "logprobs",
    "seed",
)
"""The options that ``fast_generate`` supports with vLLM and with transformers, under vLLM's names.
"""

VLLM_ONLY_OPTIONS = ("use_tqdm", "priority", "tokenization_kwargs")

REPLACED_HF_ARGUMENTS = {
    "max_new_tokens": "max_tokens",
    "do_sample": "temperature (0 is greedy)",
    "input_ids": "prompts, as lists of token ids",
    "inputs": "prompts, as lists of token ids",
    "attention_mask": "prompts without padding",
    "num_return_sequences": "n",
    "generation_config": "sampling_params",
    "stopping_criteria": "stop or stop_token_ids",
    "eos_token_id": "stop_token_ids",
    "pad_token_id": None,
    "num_beams": None,
    "use_cache": None,
    "streamer": None,
    "logits_processor": None,
}
"""A mapping from an argument of transformers' generate to the option of ``fast_generate`` that
replaces it. None means that no option replaces it.
"""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion, with the attribute names of vLLM's CompletionOutput.

    ``logprobs`` has one list of log-probabilities per position. If ``logprobs=0`` was requested,
    the list has one value, that of the sampled token. If ``logprobs=k`` was requested, the list has
    the values of the k most likely tokens and of the sampled token, the largest value first.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[list[float | None]] | None = None


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """The completions of one prompt, with the attribute names of vLLM's RequestOutput."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]


def is_vllm_params(params: Any) -> bool:
    """Return True if ``params`` is vLLM's own SamplingParams, or a list of them."""
    first = params[0] if isinstance(params, (list, tuple)) and params else params
    return type(first).__module__.partition(".")[0] == "vllm"


def read_sampling(params: Any, kwargs: Mapping[str, Any], *, engine: bool) -> tuple[Sampling, int]:
    """Return the sampling options and the seed from the arguments of ``fast_generate``. Without a
    seed argument, the seed is drawn from torch's global generator.

    ``engine`` tells whether the model has a vLLM engine.

    Raises:
        ConfigTypeError: an option is passed twice, ``params`` has an unsupported type, or the model
            (with or without a vLLM engine) does not support an argument.
    """
    if is_vllm_params(params):
        raise ConfigTypeError(
            "sampling_params is vLLM's SamplingParams, but the model has no vLLM engine",
            where=WHERE,
            fix="pass options such as max_tokens=... and temperature=... by name, or load the model"
            " with fast_inference=True",
        )
    if params is not None and not isinstance(params, (Mapping, Sampling)):
        raise ConfigTypeError(
            f"sampling_params has the unsupported type {type(params).__name__}",
            where=WHERE,
            fix="pass sampling_params as a mapping or a Sampling. If the model has a vLLM engine, "
            "vLLM's SamplingParams is supported too",
        )
    options = dict(params) if isinstance(params, Mapping) else {}
    for name, value in kwargs.items():
        if name in options:
            raise ConfigTypeError(
                f"{name} is in sampling_params and is also passed by name",
                where=WHERE,
                fix=f"pass {name} only once",
            )
        options[name] = value
    for name in options:
        if name not in COMMON_OPTIONS:
            _refuse_argument(name, engine=engine)
    seed, stop = options.pop("seed", None), options.pop("stop", None)
    if "stop_token_ids" in options:
        options["stop_token_ids"] = tuple(options["stop_token_ids"] or ())
    sampling = params if isinstance(params, Sampling) else Sampling(logprobs=None)
    sampling = replace(sampling, **options)
    if stop:
        sampling = replace(sampling, extra={**sampling.extra, "stop": stop})
    return sampling, int(torch.randint(2**62, (1,))) if seed is None else int(seed)


def refuse_with_sampling_params(kwargs: Mapping[str, Any]) -> None:
    """Raise an error if ``kwargs`` has keywords that cannot be combined with vLLM's SamplingParams.

    Raises:
        ConfigTypeError: a keyword is an option of SamplingParams, or vLLM's generate has no such
            keyword.
    """
    for name in kwargs:
        if name in COMMON_OPTIONS:
            raise ConfigTypeError(
                f"{name!r} cannot be used together with vLLM's SamplingParams",
                where=WHERE,
                fix=f"pass SamplingParams({name}=...)",
            )
        if name not in VLLM_ONLY_OPTIONS:
            _refuse_argument(name, engine=True)


def _refuse_argument(name: str, *, engine: bool) -> None:
    """Raise ConfigTypeError, because ``fast_generate`` does not support the argument ``name``. The
    supported arguments are in ``COMMON_OPTIONS``. The message names the library that supports the
    argument, or says that the argument is unknown.
    """
    if name in VLLM_ONLY_OPTIONS and not engine:
        raise ConfigTypeError(
            f"{name!r} is an argument of the vLLM engine, but the model has no such engine",
            where=WHERE,
            fix=f"remove {name}, or load the model with fast_inference=True",
        )
    if name in REPLACED_HF_ARGUMENTS:
        replacement = REPLACED_HF_ARGUMENTS[name]
        raise ConfigTypeError(
            f"{name!r} is an argument of Hugging Face's generate"
            + (
                ", but the model has a vLLM engine"
                if engine
                else (" and can only be used with input_ids=...")
            ),
            where=WHERE,
            fix=f"use {replacement}" if replacement else f"remove {name}",
        )
    hint = did_you_mean_text(name, (*COMMON_OPTIONS, *VLLM_ONLY_OPTIONS, *REPLACED_HF_ARGUMENTS))
    raise ConfigTypeError(f"unknown argument {name!r}{hint}", where=WHERE)


def read_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Any
) -> tuple[list[str | None], list[list[int]]]:
    """Return the texts and the token ids of one prompt or of a list of prompts. The text of a
    prompt is None if the prompt was passed as token ids.

    Texts are tokenized with the tokenizer's own special tokens, as vLLM does.

    Raises:
        ConfigTypeError: a prompt is neither text nor token ids.
    """
    is_batch = (
        isinstance(prompts, Sequence) and not isinstance(prompts, str) and not _is_ids(prompts)
    )
    texts: list[str | None] = []
    ids: list[list[int]] = []
    for index, prompt in enumerate(prompts if is_batch else [prompts]):
        value = prompt
        if isinstance(value, Mapping):
            value = value.get("prompt_token_ids", value.get("prompt"))
        if isinstance(value, str):
            texts.append(value)
            ids.append([int(token) for token in tokenizer(value)["input_ids"]])
        elif _is_ids(value):
            texts.append(None)
            ids.append([int(token) for token in value])
        else:
            raise ConfigTypeError(
                f"prompt {index} must be text or token ids, not {type(prompt).__name__}",
                where=WHERE,
                fix='pass text, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}.'
                " If the prompt is a chat, apply the tokenizer's chat template first",
            )
    return texts, ids


def _is_ids(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def to_prompt_outputs(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | None],
    rollout: Rollout,
    sampling: Sampling,
    ends: Collection[int],
) -> list[PromptOutput]:
    """Convert ``rollout`` to a list with one ``PromptOutput`` per prompt. ``ends`` are the token
    ids that end a completion.
    """
    prompt_outputs = []
    for prompt_index, text in enumerate(texts):
        rows = range(prompt_index * sampling.n, (prompt_index + 1) * sampling.n)
        outputs = [
            _completion(tokenizer, rollout, row, row - rows.start, sampling, ends) for row in rows
        ]
        prompt_outputs.append(PromptOutput(text, rollout.prompt_ids[rows.start], outputs))
    return prompt_outputs


def _completion(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    row: int,
    index: int,
    sampling: Sampling,
    ends: Collection[int],
) -> Completion:
    ids = rollout.completion_ids[row]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    stop = sampling.extra.get("stop") or ()
    for stop_text in [stop] if isinstance(stop, str) else stop:
        text = text.partition(stop_text)[0]
    ended = bool(ids) and (ids[-1] in ends or ids[-1] in sampling.stop_token_ids)
    reason = "stop" if ended or len(ids) < sampling.max_tokens else "length"
    logprobs = None if rollout.logprobs is None else rollout.logprobs[row]
    return Completion(index, text, ids, reason, logprobs)


def check_lora_request(request: Any, expected_type: type) -> None:
    """Raise an error if a ``lora_request`` is not a result of ``load_lora``."""
    if not isinstance(request, expected_type):
        raise ConfigValueError(
            f"lora_request has the unsupported type {type(request).__name__}",
            where=WHERE,
            fix="pass the result of model.load_lora(folder), or None for the base model",
        )
