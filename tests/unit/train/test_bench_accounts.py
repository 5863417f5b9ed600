"""The time of the toolkit's arm of the benchmark: kinds of kernels, the difference between two
rollouts, and the phases of the start.
"""

from __future__ import annotations

import logging

import pytest
import torch

from toolkit.train.bench import kernel_times, start_times
from toolkit.train.bench.kernel_times import KernelTimes, kind_of, record_kernels
from toolkit.train.bench.start_times import StartTimer


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("_lora_shrink_kernel", "LoRA"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantization"),
        ("void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel", "attention"),
        ("void vllm::rms_norm_kernel<c10::BFloat16>", "norms and rotary"),
        ("Memset (Device)", "copies and fills"),
        ("void vllm::act_and_mul_kernel", "elementwise"),
        ("multi_tensor_apply_kernel", "optimizer"),
        ("aten::addmm", "matrix products"),
        ("_gumbel_sample_kernel", "logits and sampling"),
        ("something else", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_time_without_operations_is_host_time() -> None:
    a = torch.ones(64, 64)
    with record_kernels() as recorder:
        for _ in range(5):
            a = torch.mm(a, a) / 64
    account = recorder.kernel_times(5)
    shown = account.to_json()
    assert shown["kinds"]["matrix products"]["calls"] == 1
    assert 0 < account.busy_s <= account.wall_s
    assert account.host_s == pytest.approx(account.wall_s - account.busy_s)
    assert any(row["name"] == "aten::mm" for row in shown["top"])
    rows = kernel_times.kernel_table("decode step", shown)
    assert rows[0][0].strip() == "decode step"
    assert rows[-1][0].strip() == "host, no kernel running"


def test_subtract_removes_the_prefill() -> None:
    long = KernelTimes(32, 4.0, {"attention": [2.0, 66], "other": [1.0, 4]})
    short = KernelTimes(1, 0.8, {"attention": [0.4, 2], "LoRA": [0.1, 1]})
    left = long.subtract(short, 32)
    assert left.wall_s == pytest.approx(3.2)
    assert left.kinds == {"attention": [1.6, 64], "other": [1.0, 4]}


def test_log_messages_of_vllm_end_phases() -> None:
    account = StartTimer()
    account.end_phase("import torch")
    for text in ("Starting to load model %s...", "something", "init engine (profile, create %s"):
        account.emit(logging.LogRecord("vllm", logging.INFO, "", 0, text, ("x",), None))
    assert list(account.phases) == [
        "import torch",
        "configuration of vLLM",
        "warm-up of the engine",
    ]
    rows = start_times.phase_table(account.phases)
    assert len(rows) == 4
    assert rows[1][0].strip() == "import torch"
