"""A second process compiles the kernels of a run while this process imports its libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import engine_checkpoints
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import cases

from toolkit.config.engine_settings import graph_sizes
from toolkit.engine import kernel_process, kernel_records, kernel_worker, lora_kernels
from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.kernel_process import KernelJob
from toolkit.engine.vllm_internals import open_internals
from toolkit.gpu.reading import Reading
from toolkit.gpu.snapshot_json import node_from_json
from toolkit.policy.language_model import FastLanguageModel

pytestmark = pytest.mark.engine

SHAPES = (((64, 32, 32), 64), ((128, 128), 64))
PROGRAM = Path(__file__).with_name("kernel_worker_program.py")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return engine_checkpoints.make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a process that another test has started."""
    monkeypatch.setattr(kernel_process, "_process", None)


def job_for(checkpoint: Path, **options: Any) -> KernelJob:
    return KernelJob.from_options(EngineOptions(model=str(checkpoint), **options), SHAPES)


def test_the_job_has_the_sizes_of_the_engine(checkpoint: Path) -> None:
    job = job_for(checkpoint, max_lora_rank=32, max_num_seqs=20, max_num_batched_tokens=4096)
    assert (job.folder, job.rank, job.max_tokens) == (str(checkpoint), 32, 4096)
    assert job.graph_sizes == graph_sizes(20, 4096)
    assert job.slot_shapes == sorted(SHAPES)
    assert job_for(checkpoint, enable_lora=False).slot_shapes == []


def test_the_dtype_of_the_slots_is_that_of_the_engine(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for stored, option, expected in (
        ("float32", "auto", torch.bfloat16),
        ("float16", "auto", torch.float16),
        ("float16", "bfloat16", torch.bfloat16),
    ):
        (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": stored}))
        job = job_for(checkpoint, dtype=option)
        assert lora_kernels.slots_of_job(job).dtype == expected


def run_worker(job: KernelJob, cache: Path) -> tuple[list[str], bytes]:
    """Return the names of the kernels that the worker compiled, and what it wrote to stdout."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "VLLM_LOGGING_LEVEL": "INFO"}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        output, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(120) == 0, errors[-3000:].decode()
    names: list[str] = json.loads(errors.splitlines()[-1])
    return names, output


@pytest.mark.thorough
def test_the_process_compiles_the_kernels_once(checkpoint: Path, tmp_path: Path) -> None:
    job = job_for(checkpoint, max_lora_rank=16, max_num_seqs=4, max_num_batched_tokens=64)
    names, output = run_worker(job, tmp_path / "cache")
    counts = Counter(names)
    assert counts["_lora_shrink_kernel"] >= 2
    assert counts["_lora_expand_kernel"] >= 2
    # Of the recorded list: two kernels of TRL's loss. The LoRA kernels need the job, they do not.
    assert {"_forward_kernel", "_backward_kernel"} <= set(names)
    assert names.index("_forward_kernel") < names.index("_lora_shrink_kernel")
    # Nothing else may be on stdout: the other process waits for this line.
    assert output == kernel_worker.ANSWER
    # A second start finds that Triton's cache is complete. A start with other sizes does not.
    assert run_worker(job, tmp_path / "cache") == ([], b"")
    assert run_worker(replace(job, rank=64), tmp_path / "cache")[0]


@pytest.mark.parametrize(
    ("snapshot", "cpu_limit", "expected"),
    [
        ("h100x8-healthy", None, ("NVIDIA H100 80GB HBM3", (9, 0))),
        ("h100x8-healthy", 16.0, ("NVIDIA H100 80GB HBM3", (9, 0))),
        ("h100x8-healthy", 2.0, None),
        ("cpu", None, None),
    ],
)
def test_the_process_compiles_for_the_first_gpu_if_it_has_enough_cpu_time(
    snapshot: str, cpu_limit: float | None, expected: object
) -> None:
    node = node_from_json(cases.load(snapshot).node)
    cgroup = Reading({"cpu_limit": cpu_limit})
    node = replace(node, host=replace(node.host, cgroup=cgroup))
    assert kernel_worker.find_target(node) == expected


def recorded(name: str) -> dict[str, Any]:
    records = json.loads((kernel_records.SHIPPED_RECORDS / "vllm-0.25.1.json").read_text())
    record: dict[str, Any] = next(record for record in records if record["kernel"] == name)
    return record


def test_the_sizes_of_a_model_are_filled_in(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    sizes = kernel_records.read_sizes(checkpoint)
    variant = recorded("_swiglu_forward_kernel")["variant"]
    filled = kernel_records.fill_sizes(variant, sizes | {"intermediate_size": 14336})
    assert filled["constant_vals"] == [14336, 16384]
    assert filled["options"]["num_warps"] == 16
    assert filled["signature"] == variant["signature"]
    assert sizes["intermediate_size"] == config["intermediate_size"]
    with pytest.raises(KeyError):
        kernel_records.fill_sizes(variant, {})


def test_head_sizes_that_the_config_leaves_out_are_computed(tmp_path: Path) -> None:
    text = {"hidden_size": 96, "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert kernel_records.read_sizes(tmp_path) == {
        **text,
        "num_key_value_heads": 6,
        "head_dim": 16,
    }


def test_loading_a_model_sends_the_shapes_of_its_slots(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[EngineOptions, Any]] = []
    monkeypatch.setattr(kernel_process, "send_job", lambda *job: sent.append(job))
    model, _ = FastLanguageModel.from_pretrained(
        str(llama_folder),
        max_seq_length=128,
        load_in_4bit=False,
        fast_inference=True,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_bytes=1 << 26,
    )
    with model.toolkit_engine as engine:
        ((options, shapes),) = sent
        assert options == engine.options
        layers = open_internals(engine.llm).lora_manager.modules.values()
        assert shapes == {
            (tuple(b.shape[2] for b in layer.lora_b_stacked), layer.lora_a_stacked[0].shape[3])
            for layer in layers
            if hasattr(layer, "lora_a_stacked")
        }


@pytest.mark.usefixtures("no_process")
def test_no_process_is_started_without_a_gpu(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_process, "DEVICE_FILES", ())
    kernel_process.send_job(EngineOptions(model=str(checkpoint)), SHAPES)
    assert kernel_process._process is None
    kernel_process.wait_for_lora_kernels()


@pytest.mark.usefixtures("no_process")
def test_a_process_that_ends_early_does_not_stop_the_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine the second process finds no GPU and ends."""
    monkeypatch.setattr(kernel_process, "_can_help", lambda: True)
    kernel_process.start()
    first = kernel_process._process
    assert first is not None
    kernel_process.start()
    assert kernel_process._process is first
    assert first.wait(60) == 0
    # For the next engine of this process, a new process is started.
    kernel_process.send_job(EngineOptions(model=str(checkpoint)), SHAPES)
    second = kernel_process._process
    assert second is not None
    assert second is not first
    kernel_process.wait_for_lora_kernels()
    assert second.wait(60) == 0
    kernel_process.wait_for_lora_kernels()
    monkeypatch.setattr(kernel_process, "_can_help", lambda: False)
    kernel_process.start()
    assert kernel_process._process is None


@pytest.mark.usefixtures("no_process")
def test_a_process_that_does_not_answer_does_not_stop_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_process, "MAX_WAIT_S", 0.2)
    program = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        monkeypatch.setattr(kernel_process, "_process", process)
        kernel_process.wait_for_lora_kernels()
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.usefixtures("no_process")
def test_the_conditions_for_a_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_process, "DEVICE_FILES", (str(tmp_path),))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert kernel_process._can_help()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not kernel_process._can_help()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(kernel_process.SWITCH_VARIABLE, "off")
    assert not kernel_process._can_help()
    monkeypatch.delenv(kernel_process.SWITCH_VARIABLE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert not kernel_process._can_help()


@pytest.mark.usefixtures("no_process")
def test_no_job_is_sent_for_a_split_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_process, "_can_help", lambda: True)
    kernel_process.send_job(EngineOptions(model=str(checkpoint), tensor_parallel_size=2), SHAPES)
    assert kernel_process._process is None


def test_the_process_ends_with_the_one_that_started_it() -> None:
    program = (
        "import queue, threading\n"
        "from toolkit.engine import kernel_worker\n"
        "jobs = queue.SimpleQueue()\n"
        "threading.Thread(target=kernel_worker._read_jobs, args=(jobs,), daemon=True).start()\n"
        "print(jobs.get(), flush=True)\n"
        "threading.Event().wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdin.write(b"a job\n")
        assert process.stdout.readline() == b"a job\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 0
