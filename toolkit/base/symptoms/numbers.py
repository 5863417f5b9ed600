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
_NEARLY_EMPTY = 0.9
_TENANT_SHARE = 0.05
_ALLOCATOR_SHARE = 0.05
_NEXT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_RAISED_LATEST = 1200


def _gib(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.search(text)
    return float(found[1]) * _UNITS[found[2].lower()] if found else None


def round_down_share(value: float) -> float:
    """A fraction of a card's memory, rounded down to two decimal places."""
    return math.floor(value * 100 + 1e-9) / 100


def out_of_memory(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read torch's message about a failed allocation. Return the symptom with the missing bytes and
    the cause: another process, the allocator, or a run that needs too much memory.
    """
    del hit
    said = around[:_RAISED_LATEST]
    tried, total, free = _gib(_TRIED, said), _gib(_TOTAL, said), _gib(_FREE, said)
    if tried is None or total is None or free is None:
        return symptom
    held = {one[1]: float(one[2]) * _UNITS[one[3].lower()] for one in _OTHERS.finditer(said)}
    if sum(held.values()) >= max(_TENANT_SHARE * total, tried - free):
        return _tenant(symptom, held, total)
    unused = _gib(_UNUSED, said) or 0.0
    if unused >= max(_ALLOCATOR_SHARE * total, tried - free):
        return symptom.with_values(
            title=f"CUDA ran out of memory although {unused:.2f} GiB are reserved in unused pieces",
            check="host.env",
            remedy="set PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF to "
            "expandable_segments:True, or leave them unset, because `toolkit train` then sets "
            f"them. {unused:.2f} GiB are reserved but unallocated; {tried:.2f} GiB "
            "were requested",
        )
    if tried >= total:
        return symptom.with_values(
            title=f"One tensor of {tried:.2f} GiB is larger than the card ({total:.2f} GiB)",
            remedy="lower per_device_train_batch_size, max_completion_length or "
            "max_num_batched_tokens; `envcheck size run.yaml` shows what each saves",
        )
    short = tried - free
    if short <= 0:  # the process or WSL has a limit, or the free pieces are too small
        return symptom.with_values(
            title=f"CUDA ran out of memory although {free:.2f} GiB of {total:.2f} GiB are free",
            remedy="lower gpu_memory_utilization. Under WSL, which limits the memory of a process, "
            "give WSL more of the host's memory (.wslconfig). If that does not help, set "
            "PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF to expandable_segments:True",
        )
    share = math.ceil(short / total * 100) / 100
    return symptom.with_values(
        title=f"CUDA ran out of memory: {short:.2f} GiB are missing on a card of {total:.2f} GiB",
        remedy=f"lower gpu_memory_utilization by at least {share:.2f} ({short:.2f} GiB of "
        f"{total:.2f}), lower per_device_train_batch_size or max_completion_length, or "
        "turn gradient checkpointing on; `envcheck size run.yaml` shows what each saves",
    )


def _tenant(symptom: Symptom, held: dict[str, float], total: float) -> Symptom:
    who = ", ".join(f"process {pid} ({amount:.2f} GiB)" for pid, amount in held.items())
    return symptom.with_values(
        title=f"Other processes use {sum(held.values()):.2f} of the card's {total:.2f} GiB",
        check="memory.tenant, memory.free",
        remedy=f"wait for {who} or end it (`envcheck probe` shows its name), or use another card. "
        "If that process is a rank of this run, give each rank its own card",
        exit_code=4,
    )


def free_share(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read the free and the total memory of the card from the error text. Add to the remedy the
    largest gpu_memory_utilization that fits.

    The remedy advises to wait for another process only if such a process uses much of the card's
    memory.
    """
    del hit
    amounts = re.search(r"\(\s*([\d.]+)\s*/\s*([\d.]+)\s*GiB\)", around[:300])
    if amounts is None or not float(amounts[2]):
        return symptom
    free, total = float(amounts[1]), float(amounts[2])
    fits = round_down_share(free / total)
    if free < _NEARLY_EMPTY * total:
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


def longest_length(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read two numbers from vLLM's message: the longest sequence that fits, and the bytes that the
    KV cache lacks. Add both numbers to the remedy.
    """
    del hit
    said = around[:900]
    longest = re.search(r"estimated maximum model length is (\d+)", said, re.I) or re.search(
        r"can be stored in KV cache \((\d+)\)", said, re.I
    )
    sizes = re.search(
        r"\(?([\d.]+) Gi?B KV cache is needed.{0,80}?available KV cache memory \(([\d.]+)",
        said,
        re.I,
    )
    steps = []
    if longest and int(longest[1]) > 0:
        steps.append(f"set max_seq_length to at most {longest[1]}")
    if sizes:
        more = float(sizes[1]) - float(sizes[2])
        steps.append(f"raise gpu_memory_utilization so that the engine has {more:.2f} GiB more")
    if not steps:
        return symptom
    return symptom.with_values(
        remedy=f"{', or '.join(steps)}, or use float8_kv_cache; `envcheck size run.yaml` shows "
        "what each saves"
    )


def lora_rank(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read the LoRA rank of the adapter from the error text, and add to the remedy the smallest
    legal max_lora_rank for this rank.
    """
    del around
    numbers = [int(float(one)) for one in hit.groups() if one]
    fits = next((one for one in _NEXT_RANKS if numbers and one >= numbers[0]), None)
    if fits is None:
        return symptom
    return symptom.with_values(remedy=f"set max_lora_rank to {fits}, or to auto")


def halve_sequences(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read max_num_seqs from the error text (as the number of dummy requests), and add half of it
    to the remedy.
    """
    del around
    half = max(1, int(float(hit.group(1))) // 2)
    return symptom.with_values(
        remedy=f"set max_num_seqs to {half} or less, or to auto; the warm-up needs memory for "
        "max_num_seqs x vocabulary numbers"
    )


def model_length(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read the maximum sequence length of the model from the error text, and add it to the remedy.
    If the text does not state the length, change nothing.
    """
    del hit
    longest = re.search(
        r"(?:max_position_embeddings|derived_max_model_len|max_model_len|maximum context length is"
        r"|model_max_length)[=: ]+(\d+)",
        re.sub(r"User-specified max_model_len \(\d+\)", "", around[:500]),
        re.I,
    )
    if longest is None:
        return symptom
    return symptom.with_values(remedy=f"set max_seq_length to at most {longest[1]}")


def capability(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read the required and the actual compute capability from the error text (written as 8.9 or
    89), and add them to the title.
    """
    del hit
    numbers = re.search(
        r"capability(?: of at least)?:? (\d+\.?\d*)\b.{0,80}?capability:? (\d+\.?\d*)",
        around[:500],
        re.I,
    )
    if numbers is None:
        return symptom
    need, have = (one.rstrip(".") for one in numbers.groups())
    need, have = (one if "." in one else f"{one[:-1]}.{one[-1]}" for one in (need, have))
    return symptom.with_values(
        title=f"{symptom.title}: {need} is required, but the card has {have}",
    )


def driver_cuda(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read a CUDA version from the error text, and add it to the title. It is the version that the
    driver supports (``12040`` means CUDA 12.4), or the version that the container image requires.
    """
    del hit
    found = re.search(r"found version (\d+)", around[:300], re.I)
    needed = re.search(r"cuda ?>= ?(\d+\.\d+)", around[:300], re.I)
    if found:
        number = int(found[1])
        have = f"{number // 1000}.{number % 1000 // 10}"
        return symptom.with_values(title=f"{symptom.title} (the driver supports CUDA {have})")
    if needed:
        return symptom.with_values(title=f"{symptom.title} (CUDA {needed[1]} is required)")
    return symptom


def shared_memory(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read the size of the shared-memory segment that NCCL could not create, and add it to the
    title.
    """
    del hit
    size = re.search(r"\(size (\d+)\)", around[:400])
    if size is None:
        return symptom
    return symptom.with_values(
        title=f"{symptom.title} (a segment of {int(size[1]) / 2**20:.1f} MiB was requested)"
    )


def card_count(symptom: Symptom, hit: re.Match[str], around: str) -> Symptom:
    """Read the requested and the available number of cards from the error text, and add them to the
    remedy.
    """
    del around
    numbers = [int(float(one)) for one in hit.groups() if one]
    if len(numbers) < 2:
        return symptom
    asked, have = numbers[:2]
    return symptom.with_values(
        remedy=f"start {have} processes or use a tensor_parallel_size of at most {have}, or give "
        f"the job {asked} GPUs (CUDA_VISIBLE_DEVICES, --gpus, --gres)"
    )
