"""Read the numbers in an error text, and add details to the symptom: which process uses the memory,
how much memory is missing, and which value of a setting fits.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.base.symptoms.symptom import Symptom

_UNITS = {
    "bytes": 1 / 2**30,
    "kib": 1 / 2**20,
    "mib": 1 / 1024,
    "gib": 1.0,
    "gb": 1.0,
    "mb": 1 / 1024,
}
_AMOUNT = r"([\d.]+) ?(bytes|[KMG]i?B)"
_TRIED = re.compile(rf"Tried to allocate {_AMOUNT}", re.I)
_TOTAL = re.compile(rf"total capacity of {_AMOUNT}", re.I)
_FREE = re.compile(rf"of which {_AMOUNT} is free", re.I)
_OTHERS = re.compile(rf"\bProcess (\d+) has {_AMOUNT} memory in use", re.I)
_UNUSED = re.compile(rf"{_AMOUNT} is reserved by PyTorch but unallocated", re.I)
_NEARLY_EMPTY_SHARE = 0.9
_TENANT_SHARE = 0.05
_ALLOCATOR_SHARE = 0.05
_LEGAL_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MESSAGE_CHARACTERS = 1200


def _gib(pattern: re.Pattern[str], text: str) -> float | None:
    match = pattern.search(text)
    return float(match[1]) * _UNITS[match[2].lower()] if match else None


def round_down_share(value: float) -> float:
    """A fraction of a card's memory, rounded down to two decimal places."""
    return math.floor(value * 100 + 1e-9) / 100


def out_of_memory(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read torch's message about a failed allocation. Return the symptom with the missing bytes and
    the cause: another process, the allocator, or a run that needs too much memory.
    """
    del match
    excerpt = context[:_MESSAGE_CHARACTERS]
    tried, total, free = _gib(_TRIED, excerpt), _gib(_TOTAL, excerpt), _gib(_FREE, excerpt)
    if tried is None or total is None or free is None:
        return symptom
    held_gib = {
        process[1]: float(process[2]) * _UNITS[process[3].lower()]
        for process in _OTHERS.finditer(excerpt)
    }
    if sum(held_gib.values()) >= max(_TENANT_SHARE * total, tried - free):
        return _tenant(symptom, held_gib, total)
    unused_gib = _gib(_UNUSED, excerpt) or 0.0
    if unused_gib >= max(_ALLOCATOR_SHARE * total, tried - free):
        return symptom.with_values(
            title=f"CUDA ran out of memory although {unused_gib:.2f} GiB are "
            "reserved in unused pieces",
            check="host.env",
            remedy="set PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF to "
            "expandable_segments:True, or leave them unset, because `toolkit train` then sets "
            f"them. {unused_gib:.2f} GiB are reserved but unallocated; {tried:.2f} GiB "
            "were requested",
        )
    if tried >= total:
        return symptom.with_values(
            title=f"One tensor of {tried:.2f} GiB is larger than the card ({total:.2f} GiB)",
            remedy="lower per_device_train_batch_size, max_completion_length or "
            "max_num_batched_tokens; `envcheck size run.yaml` shows what each saves",
        )
    missing = tried - free
    if missing <= 0:  # the process or WSL has a limit, or the free pieces are too small
        return symptom.with_values(
            title=f"CUDA ran out of memory although {free:.2f} GiB of {total:.2f} GiB are free",
            remedy="lower gpu_memory_utilization. Under WSL, which limits the memory of a process, "
            "give WSL more of the host's memory (.wslconfig). If that does not help, set "
            "PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF to expandable_segments:True",
        )
    share = math.ceil(missing / total * 100) / 100
    return symptom.with_values(
        title=f"CUDA ran out of memory: {missing:.2f} GiB are missing on a card of {total:.2f} GiB",
        remedy=f"lower gpu_memory_utilization by at least {share:.2f} ({missing:.2f} GiB of "
        f"{total:.2f}), lower per_device_train_batch_size or max_completion_length, or "
        "turn gradient checkpointing on; `envcheck size run.yaml` shows what each saves",
    )


def _tenant(symptom: Symptom, held_gib: dict[str, float], total: float) -> Symptom:
    who = ", ".join(f"process {pid} ({amount:.2f} GiB)" for pid, amount in held_gib.items())
    return symptom.with_values(
        title=f"Other processes use {sum(held_gib.values()):.2f} of the card's {total:.2f} GiB",
        check="memory.tenant, memory.free",
        remedy=f"wait for {who} or end it (`envcheck probe` shows its name), or use another card. "
        "If that process is a rank of this run, give each rank its own card",
        exit_code=4,
    )


def largest_utilization(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read the free and the total memory of the card from the error text. Add to the remedy the
    largest gpu_memory_utilization that fits.

    If other processes use much of the card's memory, the remedy also says to wait for the process
    or to end it.
    """
    del match
    amounts = re.search(r"\(\s*([\d.]+)\s*/\s*([\d.]+)\s*GiB\)", context[:300])
    if amounts is None or not float(amounts[2]):
        return symptom
    free, total = float(amounts[1]), float(amounts[2])
    fits = round_down_share(free / total)
    if free < _NEARLY_EMPTY_SHARE * total:
        return symptom.with_values(
            remedy=f"wait for the process that uses {total - free:.2f} GiB, or end it (`envcheck "
            f"probe` names it), or set gpu_memory_utilization to at most {fits:.2f} (`envcheck "
            "size run.yaml` shows whether that is enough)"
        )
    return symptom.with_values(
        remedy=f"set gpu_memory_utilization to at most {fits:.2f}, or to auto: the card is empty, "
        "but smaller than the requested memory",
        exit_code=1,
    )


def longest_length(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read two numbers from vLLM's message: the longest sequence that fits, and the bytes that the
    KV cache lacks. Add both numbers to the remedy.
    """
    del match
    excerpt = context[:900]
    longest = re.search(r"estimated maximum model length is (\d+)", excerpt, re.I) or re.search(
        r"can be stored in KV cache \((\d+)\)", excerpt, re.I
    )
    sizes = re.search(
        r"\(?([\d.]+) Gi?B KV cache is needed.{0,80}?available KV cache memory \(([\d.]+)",
        excerpt,
        re.I,
    )
    steps = []
    if longest and int(longest[1]) > 0:
        steps.append(f"set max_seq_length to at most {longest[1]}")
    if sizes:
        missing_gib = float(sizes[1]) - float(sizes[2])
        steps.append(
            f"raise gpu_memory_utilization so that the engine has {missing_gib:.2f} GiB more"
        )
    if not steps:
        return symptom
    return symptom.with_values(
        remedy=f"{', or '.join(steps)}, or use float8_kv_cache; `envcheck size run.yaml` shows "
        "what each saves"
    )


def lora_rank(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read the LoRA rank of the adapter from the error text, and add to the remedy the smallest
    legal max_lora_rank for this rank.
    """
    del context
    numbers = [int(float(number)) for number in match.groups() if number]
    legal_rank = next((number for number in _LEGAL_RANKS if numbers and number >= numbers[0]), None)
    if legal_rank is None:
        return symptom
    return symptom.with_values(remedy=f"set max_lora_rank to {legal_rank}, or to auto")


def halve_sequences(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read max_num_seqs from the error text, and suggest half of this value in the remedy. The
    error text calls the value the number of dummy requests.
    """
    del context
    half = max(1, int(float(match.group(1))) // 2)
    return symptom.with_values(
        remedy=f"set max_num_seqs to {half} or less, or to auto; the warm-up needs memory for "
        "max_num_seqs x vocabulary numbers"
    )


def model_length(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read the maximum sequence length of the model from the error text, and add it to the remedy.
    If the text does not state the length, change nothing.
    """
    del match
    longest = re.search(
        r"(?:max_position_embeddings|derived_max_model_len|max_model_len|maximum context length is"
        r"|model_max_length)[=: ]+(\d+)",
        re.sub(r"User-specified max_model_len \(\d+\)", "", context[:500]),
        re.I,
    )
    if longest is None:
        return symptom
    return symptom.with_values(remedy=f"set max_seq_length to at most {longest[1]}")


def capability(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read the required and the actual compute capability from the error text (written as 8.9 or
    89), and add them to the title.
    """
    del match
    numbers = re.search(
        r"capability(?: of at least)?:? (\d+\.?\d*)\b.{0,80}?capability:? (\d+\.?\d*)",
        context[:500],
        re.I,
    )
    if numbers is None:
        return symptom
    required, actual = (number.rstrip(".") for number in numbers.groups())
    required, actual = (
        number if "." in number else f"{number[:-1]}.{number[-1]}" for number in (required, actual)
    )
    return symptom.with_values(
        title=f"{symptom.title}: {required} is required, but the card has {actual}",
    )


def driver_cuda(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read a CUDA version from the error text, and add it to the title. It is the version that the
    driver supports (``12040`` means CUDA 12.4), or the version that the container image requires.
    """
    del match
    found_version = re.search(r"found version (\d+)", context[:300], re.I)
    needed_version = re.search(r"cuda ?>= ?(\d+\.\d+)", context[:300], re.I)
    if found_version:
        number = int(found_version[1])
        driver_version = f"{number // 1000}.{number % 1000 // 10}"
        return symptom.with_values(
            title=f"{symptom.title} (the driver supports CUDA {driver_version})"
        )
    if needed_version:
        return symptom.with_values(title=f"{symptom.title} (CUDA {needed_version[1]} is required)")
    return symptom


def shared_memory(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read the size of the shared-memory segment that NCCL could not create, and add it to the
    title.
    """
    del match
    size = re.search(r"\(size (\d+)\)", context[:400])
    if size is None:
        return symptom
    return symptom.with_values(
        title=f"{symptom.title} (a segment of {int(size[1]) / 2**20:.1f} MiB was requested)"
    )


def card_count(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Read the requested and the available number of cards from the error text, and add them to the
    remedy.
    """
    del context
    numbers = [int(float(number)) for number in match.groups() if number]
    if len(numbers) < 2:
        return symptom
    requested, available = numbers[:2]
    return symptom.with_values(
        remedy=f"start {available} processes or use a tensor_parallel_size of at most {available}, "
        f"or give the job {requested} GPUs (CUDA_VISIBLE_DEVICES, --gpus, --gres)"
    )
