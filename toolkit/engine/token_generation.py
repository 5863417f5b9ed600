"""Generate token ids and log-probabilities with vLLM. The code does little work in Python per
token, so that rollouts are fast.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from toolkit.base.errors import ConfigError, ConfigValueError
from toolkit.config.sampling_keywords import unknown_keyword_problem
from toolkit.engine.rollout_request import Rollout, request_seed
from toolkit.engine.vllm_internals import drop_requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm import LLM
    from vllm.logprobs import FlatLogprobs
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

    from toolkit.engine.rollout_request import Sampling

REJECTIONS = (TypeError, ValueError, VLLMValidationError)
"""The exceptions with which vLLM rejects a request. VLLMValidationError is listed because from 0.31
on it is not a ValueError.
"""

FAILED_FINISH_REASONS = frozenset({"abort", "error"})
"""vLLM's finish reasons for a request that failed without an exception, for example because of a
grammar that does not compile.
"""


def to_sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    """Convert ``sampling`` to vLLM's SamplingParams.

    Raises:
        ConfigValueError: vLLM rejects a value, or does not have an option in ``sampling.extra``.
    """
    for name in sampling.extra:
        problem = unknown_keyword_problem(name, "vllm")
        if problem is not None:
            raise ConfigValueError(problem.message, where="sampling options", fix=problem.fix)
    keywords: dict[str, Any] = {
        "n": sampling.n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0 if sampling.min_p is None else sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "logprobs": sampling.logprobs,
        "seed": seed,
        "detokenize": False,
        # Request one flat list per sequence instead of a dict of objects per token.
        "flat_logprobs": True,
    }
    if sampling.stop_token_ids:
        keywords["stop_token_ids"] = list(sampling.stop_token_ids)
    keywords |= dict(sampling.extra)
    if keywords.get("stop") or keywords.get("bad_words"):
        keywords["detokenize"] = True  # vLLM matches stop strings in text
    structured = keywords.get("structured_outputs")
    bias = keywords.get("logit_bias")
    try:
        if isinstance(bias, dict):  # the keys are token ids, which are strings in a run file
            keywords["logit_bias"] = {int(token): value for token, value in bias.items()}
        if sampling.structured_outputs_regex is not None:
            keywords["structured_outputs"] = StructuredOutputsParams(
                regex=sampling.structured_outputs_regex
            )
        elif isinstance(structured, dict):
            keywords["structured_outputs"] = StructuredOutputsParams(**structured)
        return SamplingParams(**keywords)
    except REJECTIONS as problem:
        raise ConfigValueError(
            f"vLLM rejects the sampling options: {problem}",
            where="sampling options",
        ) from problem


@contextmanager
def convert_rejections(llm: LLM) -> Iterator[None]:
    """A context manager for a call of ``llm.generate``. If vLLM rejects a request, its exception
    becomes a ConfigValueError.

    vLLM checks each request when the request is added. If vLLM rejects a request, it also removes
    the requests that were added before, so the engine has no requests afterwards. If the engine
    still has requests after an exception, the exception comes from a generation step. Such an
    exception is not converted.

    Raises:
        ConfigValueError: vLLM rejects a request.
    """
    try:
        yield
    except REJECTIONS as problem:
        if llm.llm_engine.has_unfinished_requests():
            raise
        raise ConfigValueError(
            f"vLLM rejects the request: {problem}",
            where="sampling options",
            fix="change the option that the message of vLLM names. In a run file it is in "
            "`grpo.generation_kwargs` or `grpo.vllm_structured_outputs_regex`",
        ) from problem


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    lora: LoRARequest | None,
    rows: Sequence[int],
) -> Rollout:
    """Sample ``sampling.n`` completions of each prompt. ``rollout_engine.RolloutEngine`` explains
    ``rows``.

    Each prompt is one request with n completions, so vLLM computes the prompt only once. Each
    request has its own seed, so its result does not depend on earlier calls or on other requests.
    """
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    params = [
        to_sampling_params(sampling, request_seed(seed, row))
        for _, row in zip(prompts, rows, strict=True)
    ]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    outputs: Sequence[RequestOutput] = []
    # vLLM also draws from torch's global generators. They are restored, because the trainer uses
    # them too.
    with convert_rejections(llm), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if requests:
            outputs = llm.generate(requests, params, lora_request=lora, use_tqdm=False)
    return build_rollout(prompts, outputs)


def vllm_generate(llm: LLM, inputs: Any, sampling_params: Any, **keywords: Any) -> Any:
    """Call ``llm.generate``. If the call is interrupted, no request stays in the engine.

    Raises:
        ConfigValueError: vLLM rejects the request.
    """
    try:
        with convert_rejections(llm):
            return llm.generate(inputs, sampling_params, **keywords)
    except BaseException:
        drop_requests(llm)
        raise


def build_rollout(prompts: Sequence[Sequence[int]], outputs: Sequence[RequestOutput]) -> Rollout:
    """Convert the outputs of vLLM to a ``Rollout``, which has TRL's layout.

    Raises:
        ConfigError: vLLM aborted a request.
    """
    prompt_ids: list[list[int]] = []
    completion_ids: list[list[int]] = []
    logprobs: list[list[list[float | None]]] | None = []
    token_ids: list[list[list[int]]] | None = []
    for prompt, output in zip(prompts, outputs, strict=True):
        for completion in output.outputs:
            if completion.finish_reason in FAILED_FINISH_REASONS:
                raise ConfigError(
                    f"vLLM aborted a completion ({completion.finish_reason})",
                    where="rollout",
                    fix=(
                        "correct `vllm_structured_outputs_regex` or `generation_kwargs`. The "
                        "log of vLLM shows why it aborted the completion"
                    ),
                )
            prompt_ids.append(list(prompt))
            completion_ids.append(list(completion.token_ids))
            if completion.logprobs is None:
                logprobs = token_ids = None
            elif logprobs is not None and token_ids is not None:
                values, tokens = unpack_logprobs(completion.logprobs)
                logprobs.append(values)
                token_ids.append(tokens)
    return Rollout(prompt_ids, completion_ids, logprobs, token_ids)


def unpack_logprobs(flat: FlatLogprobs) -> tuple[list[list[float | None]], list[list[int]]]:
    """Return the log-probabilities of one sequence and their token ids, both as nested lists
    [position][index]. As in TRL, each position has each token only once, and its tokens are ordered
    by probability, the most likely token first.

    In vLLM's lists, a position has the sampled token first and then the k most likely tokens, which
    may contain the sampled token again.
    """
    size = len(flat.logprobs)
    # Usually each position has one token, and sorting is not needed.
    if size == len(flat.start_indices):
        return (
            [[None if math.isnan(value) else value] for value in flat.logprobs],
            [[token] for token in flat.token_ids],
        )
    values: list[list[float | None]] = []
    tokens: list[list[int]] = []
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        index_of_token = {flat.token_ids[i]: i for i in range(start, end)}
        order = sorted(index_of_token.values(), key=lambda i: flat.ranks[i] or 0)
        values.append([None if math.isnan(flat.logprobs[i]) else flat.logprobs[i] for i in order])
        tokens.append([flat.token_ids[i] for i in order])
    return values, tokens
