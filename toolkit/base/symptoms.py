"""The error texts that people paste most, each with the check that would have caught it and what to
do.

``match`` reads a traceback or a log. ``envcheck explain -`` prints what it finds, and a failed
engine start is told to the user in these words. The texts are those of vLLM 0.8 to 0.31, torch 2.6
to 2.13 and the CUDA runtime; a changed wording upstream shows in tests/contract.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# A pasted log may be long and its cause stands near the end; reading more than this buys nothing.
LONGEST_TEXT = 2_000_000


@dataclass(frozen=True, slots=True)
class Symptom:
    """One known failure: ``check`` names the checks, the rules or the part of ``envcheck size``
    that find it before a GPU-second is spent.

    ``exit_code`` is the one of ``base.errors.EXIT_CODES`` that fits who must act.
    """

    id: str
    title: str
    check: str
    remedy: str
    exit_code: int


_FREE_OF_TOTAL = re.compile(r"\(\s*([\d.]+)\s*/\s*([\d.]+)\s*GiB\)")


def _by_free_share(symptom: Symptom, pasted: str) -> Symptom:
    """A card that is nearly empty has no tenant: then the request is too large, and waiting would
    not help.
    """
    amounts = _FREE_OF_TOTAL.search(pasted)
    if amounts is None or float(amounts[1]) < 0.9 * float(amounts[2]):
        return symptom
    return replace(
        symptom,
        remedy="the card is empty and the request is above what it has: lower "
        "gpu_memory_utilization, or set it to auto",
        exit_code=1,
    )


def _entry(
    symptom_id: str, title: str, check: str, remedy: str, exit_code: int, *patterns: str
) -> tuple[Symptom, re.Pattern[str]]:
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    symptom = Symptom(symptom_id, title, check, remedy, exit_code)
    return symptom, re.compile(joined, re.IGNORECASE | re.DOTALL)


_CAPTURE = r"(?:capture_model|_capture_cudagraphs|captur\w+ (?:CUDA )?graphs?)"

# Most specific first: what another text explains better stands below that one.
_ENTRIES = (
    _entry(
        "no-cache-blocks",
        "The engine has no memory left for its KV cache",
        "size: interval.min",
        "raise gpu_memory_utilization above interval.min of `envcheck size run.yaml`, or "
        "set it to auto",
        1,
        r"No available memory for the cache blocks",
    ),
    _entry(
        "free-below-request",
        "Less memory is free than gpu_memory_utilization asks for",
        "memory.free",
        "another process holds memory: wait for it or end it (`envcheck probe` names it), "
        "or lower gpu_memory_utilization"
        " to interval.max of `envcheck size run.yaml`",
        4,
        r"Free memory on device.{0,120}?(?:on startup )?is less than desired GPU memory "
        r"utilization",
    ),
    _entry(
        "sequence-does-not-fit",
        "One sequence of max_seq_length does not fit in the KV cache",
        "size: interval.min",
        "lower max_seq_length, raise gpu_memory_utilization, or use float8_kv_cache; "
        "`envcheck size run.yaml` prices each",
        1,
        # Releases up to 0.11 say "the models's".
        r"To serve at least one request with the models?'?s? max seq len",
        r"model'?s max seq len \(\d+\) is larger than the maximum number of tokens that can "
        r"be stored in KV cache",
    ),
    _entry(
        "lora-rank",
        "The adapter's rank is above what the engine was built for, or is not a rank "
        "that vLLM builds",
        "LORA002, LORA003",
        "set max_lora_rank to auto, or to the next of 1, 8, 16, 32, 64, 128, 256, 320, "
        "512 that is at least lora.r",
        1,
        r"LoRA rank \d+ is greater than max_lora_rank",
        r"max_lora_rank.{0,200}?Input should be 1, ?8, ?16",
        r"max_lora_rank \(\d+\) must be one of",
    ),
    _entry(
        "sampler-warm-up",
        "The engine ran out of memory while warming up its sampler",
        "size: choice.max_num_seqs",
        "lower max_num_seqs, or set it to auto: the warm-up grows with max_num_seqs x vocabulary",
        1,
        r"when warming up sampler with \d+ dummy requests",
    ),
    _entry(
        "graph-capture",
        "Memory ran out while capturing CUDA graphs",
        "size: CUDA graphs",
        "lower gpu_memory_utilization to interval.max of `envcheck size run.yaml`, or "
        "set enforce_eager: true",
        1,
        r"out of memory.{0,200}?captur\w+ (?:CUDA )?graphs?",
        # Each start is looked at until the next one, so that many of them cost no more than one.
        rf"{_CAPTURE}(?:(?!{_CAPTURE}).){{0,4000}}?out of memory",
    ),
    _entry(
        "training-out-of-memory",
        "CUDA ran out of memory",
        "size: trainer peak at the longest completion",
        "lower gpu_memory_utilization, per_device_train_batch_size or "
        "max_completion_length, or turn gradient checkpointing"
        " on; `envcheck size run.yaml` prices each. In the first seconds of a run it may "
        "be a tenant: `envcheck probe`",
        1,
        r"CUDA out of memory",
        r"CUDA error: out of memory",
        r"torch\.(?:cuda\.)?OutOfMemoryError",
    ),
    _entry(
        "neighbour-moved",
        "Another process freed or took GPU memory while the engine was measuring",
        "memory.tenant",
        "start again; if it comes back, find the neighbour with `envcheck probe` and use "
        "the card alone",
        4,
        r"Error in memory profiling\.? ?Initial free memory",
    ),
    _entry(
        "expandable-segments",
        "This vLLM release cannot do expandable_segments beside its sleep mode",
        "software.pins",
        "install the vLLM of the lock files, which can; or set PYTORCH_CUDA_ALLOC_CONF and "
        "PYTORCH_ALLOC_CONF to expandable_segments:False, or turn KV sleep off",
        1,
        r"Expandable segments are not compatible with memory pool",
    ),
    _entry(
        "cuda-802",
        "CUDA error 802: the system is not yet initialised (the NVSwitch fabric is not ready)",
        "health.fabric",
        "start nvidia-fabricmanager of the driver's own version on the node and wait "
        "until `envcheck probe` shows the"
        " fabric as ready",
        3,
        r"(?:CUDA )?error:? 802\b",
        r"system not yet initialized",
        r"cudaErrorSystemNotReady|CUDA_ERROR_SYSTEM_NOT_READY",
    ),
    _entry(
        "cuda-803",
        "CUDA error 803: libcuda.so.1 and the kernel module do not fit together",
        "driver.libcuda",
        "another libcuda than the driver's is found first: take compat or stubs folders "
        "out of LD_LIBRARY_PATH, or reload"
        " the driver after its update",
        3,
        r"(?:CUDA )?error:? 803\b",
        r"unsupported display driver ?/ ?cuda driver combination",
        r"cudaErrorSystemDriverMismatch|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    ),
    _entry(
        "cuda-804",
        "CUDA error 804: forward compatibility was tried on a card that does not have it",
        "driver.compat",
        "remove the cuda-compat folder from LD_LIBRARY_PATH, and use a CUDA that the "
        "driver itself supports",
        1,
        r"(?:CUDA )?error:? 804\b",
        r"forward compatibility was attempted on non[- ]supported H",
        r"cudaErrorCompatNotSupportedOnDevice|CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    ),
    _entry(
        "no-kernel-image",
        "The installed torch or vLLM has no code for this card",
        "software.arch",
        "install the build for this card's compute capability (`envcheck check --only "
        "software` names both)",
        1,
        r"no kernel image is available for execution",
        r"with CUDA capability sm_\d+ is not compatible with the current PyTorch",
        r"cudaErrorNoKernelImageForDevice",
    ),
    _entry(
        "uuid-in-visible-devices",
        "This vLLM release reads CUDA_VISIBLE_DEVICES as numbers only",
        "devices.uuid",
        "write the index of the GPU instead of its UUID, or install vllm 0.25.1 "
        "(releases up to 0.20 are known to fail)",
        1,
        r"invalid literal for int\(\) with base 10: ['\"](?:MIG|GPU)-",
    ),
)

# What terminals, loggers, launchers and mail put around a line; none of it is the message.
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
_PREFIX = re.compile(
    r"^[ \t]*(?:(?:>|[│┃|](?=\s)|\[rank\d{1,4}\]:|\([^()\n]{1,80}\bpid=\d{1,9}\)|"
    r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)[ \t]+\d[\d:.,/ -]{4,30}(?:\[[^\]\n]{1,80}\])?|"
    r"\d{4}-\d\d-\d\d[T ][\d:.,]{5,20}Z?(?:[+-][\d:]{2,6})?|"
    r"[\w.-]{1,60}[ \t]+\|(?=\s))[ \t]*){1,8}",
    re.MULTILINE,
)
_FRAME = " \t\r│┃"  # at the end of a line
LONGEST_CUT = 100_000  # a text with breaks inside words was copied from a screen

SYMPTOMS: tuple[Symptom, ...] = tuple(symptom for symptom, _ in _ENTRIES)
# Texts that also say "out of memory", and say better where.
_EXPLAIN_OUT_OF_MEMORY = {"sampler-warm-up", "graph-capture"}


def match(text: str) -> list[Symptom]:
    """The known failures in a pasted traceback or log, most specific first; empty if none is.

    Colours, log prefixes and line breaks, also inside a word, are looked through.
    """
    bare = _PREFIX.sub("", _ESCAPES.sub("", text[-LONGEST_TEXT:]))
    lines = [line.rstrip(_FRAME) for line in bare.split("\n")]
    wrapped, cut = " ".join(" ".join(lines).split()), "".join(lines)[-LONGEST_CUT:]
    found: dict[str, Symptom] = {}
    for known, pattern in _ENTRIES:
        hit = pattern.search(wrapped) or pattern.search(cut)
        if hit is None:
            continue
        if known.id == "training-out-of-memory" and _EXPLAIN_OUT_OF_MEMORY & found.keys():
            continue
        symptom = _by_free_share(known, hit.group(0)) if known.id == "free-below-request" else known
        found[known.id] = symptom
    return list(found.values())
