"""The error texts of other libraries are recognised in the wording of each release. Other texts
match no symptom.
"""

from __future__ import annotations

import textwrap
import time

import pytest

from toolkit.base.errors import EXIT_CODES
from toolkit.base.symptoms import SYMPTOMS, find_symptoms

PASTED = [
    (
        "ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization`",
        "no-cache-blocks",
        1,
    ),
    (
        "ValueError: Free memory on device cuda:0 (21.4/79.19 GiB) on startup is less than "
        "desired GPU memory utilization "
        "(0.9, 71.27 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
        "other processes.",
        "free-below-request",
        4,
    ),
    (
        "ValueError: Free memory on device (78.4/79.19 GiB) on startup is less than desired "
        "GPU memory utilization (0.995,",
        "free-below-request",
        1,
    ),
    (
        "To serve at least one request with the model's max seq len (131072), (16.00 GiB KV "
        "cache is needed",
        "sequence-does-not-fit",
        1,
    ),
    (
        "ValueError: To serve at least one request with the models's max seq len (131072), "
        "(16.00 GB KV cache is needed",
        "sequence-does-not-fit",
        1,
    ),
    (
        "The model's max seq len (32768) is larger than the maximum number of tokens that "
        "can be stored in KV cache (1024).",
        "sequence-does-not-fit",
        1,
    ),
    ("ValueError: LoRA rank 32 is greater than max_lora_rank 16.", "lora-rank", 1),
    (
        "1 validation error for LoRAConfig\nmax_lora_rank\n  Input should be 1, 8, 16, 32, "
        "64, 128, 256, 320 or 512",
        "lora-rank",
        1,
    ),
    (
        "  in training_step\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
        "training-out-of-memory",
        1,
    ),
    (
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy "
        "requests. Please try lowering",
        "sampler-warm-up",
        1,
    ),
    (
        "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  3%|\n  in capture_model\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "graph-capture",
        1,
    ),
    ("CUDA out of memory while capturing CUDA graphs", "graph-capture", 1),
    (
        "AssertionError: Error in memory profiling. Initial free memory 70.1 GiB, current "
        "free memory 72.9 GiB. This happens",
        "neighbour-moved",
        4,
    ),
    (
        "AssertionError: Expandable segments are not compatible with memory pool. Please "
        "track https://github.com/pytorch",
        "expandable-segments",
        1,
    ),
    (
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet "
        "initialized",
        "cuda-802",
        3,
    ),
    (
        "Error 803: system has unsupported display driver / cuda driver combination",
        "cuda-803",
        3,
    ),
    (
        "Error 804: forward compatibility was attempted on non supported HW",
        "cuda-804",
        1,
    ),
    (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "no-kernel-image",
        1,
    ),
    (
        "ValueError: invalid literal for int() with base 10: "
        "'MIG-377e0049-554c-540b-93c6-d0976f8426cb'",
        "uuid-in-visible-devices",
        1,
    ),
    (
        "ValueError: invalid literal for int() with base 10: "
        "'GPU-52a3a85d-3c55-ca3a-a955-82c69ed360fc'",
        "uuid-in-visible-devices",
        1,
    ),
]


@pytest.mark.parametrize(("text", "symptom", "code"), PASTED, ids=lambda value: str(value)[:30])
def test_each_text_is_recognised(text: str, symptom: str, code: int) -> None:
    found = find_symptoms(f"Traceback (most recent call last):\n  ...\n{text}\n")
    assert [(one.id, one.exit_code) for one in found] == [(symptom, code)]


RED, CYAN, PLAIN = "\x1b[31m", "\x1b[1;36m", "\x1b[0m"
LOGGED = "(EngineCore_DP0 pid=1234) ERROR 11-24 12:10:28 [core.py:708] "
DECORATED = {
    "colours": lambda lines: [RED + line.replace(" ", f" {CYAN}", 3) + PLAIN for line in lines],
    "vLLM's log, wrapped": lambda lines: [LOGGED + part for part in wrap_lines(lines, 60)],
    "torchrun": lambda lines: [f"[rank3]: {line}" for line in lines],
    "docker compose": lambda lines: [f"train-1  | {line}" for line in lines],
    "kubectl": lambda lines: [f"2026-11-24T12:00:00.123456789Z {line}" for line in lines],
    "a frame": lambda lines: [f"│ {part:<76} │" for part in wrap_lines(lines, 76)],
    "a quotation": lambda lines: [f"> {line}" for line in lines],
    "cut at 40": lambda lines: [
        line[at : at + 40] for line in lines for at in range(0, len(line), 40)
    ],
    "Windows": lambda lines: [f"{line}\r" for line in lines],
}


def wrap_lines(lines: list[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, width)]


@pytest.mark.parametrize("decoration", DECORATED)
def test_each_text_is_recognised_in_a_pasted_log(decoration: str) -> None:
    for text, symptom, code in PASTED:
        found = find_symptoms("\n".join(DECORATED[decoration](text.split("\n"))))
        assert [(one.id, one.exit_code) for one in found] == [(symptom, code)], text


def test_every_symptom_has_a_remedy() -> None:
    assert all(one.exit_code in EXIT_CODES and one.exit_code for one in SYMPTOMS)
    assert all(one.remedy and one.check and one.title for one in SYMPTOMS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ValueError: invalid literal for int() with base 10: 'seven'",
        "step 803: loss 0.12",
        "the loader used 802 MB of memory",
        "LoRA rank 16 is fine",
    ],
)
def test_other_texts_match_no_symptom(text: str) -> None:
    assert find_symptoms(text) == []


def test_two_failures_in_one_log_are_both_found() -> None:
    first, second = (
        next(text for text, symptom, _ in PASTED if symptom == wanted)
        for wanted in ("no-cache-blocks", "lora-rank")
    )
    found = find_symptoms(
        f"{first}\nDuring handling of the above exception, another occurred:\n{second}"
    )
    assert [one.id for one in found] == ["no-cache-blocks", "lora-rank"]


def test_a_huge_log_is_searched_in_bounded_time() -> None:
    log = "capture_model Free memory on device max_lora_rank out of memory " * 200_000
    start = time.perf_counter()
    find_symptoms(log)
    assert time.perf_counter() - start < 5
