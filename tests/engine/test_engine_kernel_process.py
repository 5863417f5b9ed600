"""A second process compiles the kernels of a run while this process imports its libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_checkpoints
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import cases

from toolkit.config.engine_settings import graph_sizes
from toolkit.engine import (
    kernel_process,
    kernel_records,
    kernel_worker,
    lora_kernels,
    lora_tables,
)
from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.kernel_process import KernelJob
from toolkit.engine.vllm_internals import open_internals
from toolkit.gpu.reading import Reading
from toolkit.gpu.snapshot_json import node_from_json
from toolkit.policy.language_model import FastLanguageModel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

SHAPES = (((64, 32, 32), 64), ((128, 128), 64))
PROGRAM = Path(__file__).with_name("kernel_worker_program.py")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return engine_checkpoints.make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget a process that another test has started. End the process of this test."""
    monkeypatch.setattr(kernel_process, "_child", None)
    yield
    end_process()


def end_process() -> None:
    if kernel_process._child is not None:
        kernel_process._child.close_pipes()
        kernel_process._child.process.wait(60)


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
        reader = ThreadPoolExecutor(1)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        errors = reader.submit(process.stderr.read)  # stdin stays open, so not communicate()
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        output = process.stdout.read()
        assert process.wait(120) == 0, errors.result()[-3000:].decode()
        names: list[str] = json.loads(errors.result().splitlines()[-1])
        reader.shutdown()
    return names, output


@pytest.mark.thorough
def test_the_process_compiles_the_kernels_once(checkpoint: Path, tmp_path: Path) -> None:
    job = job_for(checkpoint, max_lora_rank=16, max_num_seqs=4, max_num_batched_tokens=64)
    names, output = run_worker(job, tmp_path / "cache")
    counts = Counter(names)
    assert counts["_lora_shrink_kernel"] >= 2
    assert counts["_lora_expand_kernel"] >= 2
    # Of the recorded list: two kernels of TRL's loss. They do not need the job, so they come first.
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
    records = json.loads(kernel_records.records_file("0.25.1").read_text())["kernels"]
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
        ((options, sent_shapes),) = sent
        assert options == engine.options
        layers = open_internals(engine.llm).lora_manager.modules.values()
        assert sent_shapes() == {
            (tuple(b.shape[2] for b in layer.lora_b_stacked), layer.lora_a_stacked[0].shape[3])
            for layer in layers
            if hasattr(layer, "lora_a_stacked")
        }


def shapes() -> tuple[tuple[tuple[int, ...], int], ...]:
    return SHAPES


def child() -> kernel_process._Child:
    assert kernel_process._child is not None
    return kernel_process._child


def options_for(checkpoint: Path, **options: Any) -> EngineOptions:
    return EngineOptions(model=str(checkpoint), **options)


@pytest.mark.usefixtures("no_process")
def test_no_process_is_started_without_a_gpu(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_process, "DEVICE_FILES", ())
    kernel_process.send_job(options_for(checkpoint), shapes)
    assert kernel_process._child is None
    kernel_process.wait_for_lora_kernels()


@pytest.mark.usefixtures("no_process")
def test_each_engine_gets_a_process_of_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine the second process finds no GPU and ends."""
    monkeypatch.setattr(kernel_process, "_can_help", lambda: True)
    kernel_process.start()
    first = child()
    kernel_process.start()
    assert child() is first
    assert first.process.wait(60) == 0
    kernel_process.send_job(options_for(checkpoint), shapes)
    second = child()
    assert second is not first
    kernel_process.wait_for_lora_kernels()
    assert second.process.wait(60) == 0
    monkeypatch.setattr(kernel_process, "_can_help", lambda: False)
    kernel_process.start()
    assert kernel_process._child is None


ANSWERING_PROGRAM = """
import sys, time
if not sys.stdin.readline():
    sys.exit(0)
time.sleep(2)
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the place of the second process. It answers 2 s after it got a job."""
    with subprocess.Popen(
        [sys.executable, "-c", ANSWERING_PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        monkeypatch.setattr(kernel_process, "_child", kernel_process._Child(process))
        yield process
        assert process.stdin is not None
        process.stdin.close()


def waited_s() -> float:
    start = time.perf_counter()
    kernel_process.wait_for_lora_kernels()
    return time.perf_counter() - start


@pytest.mark.usefixtures("running")
def test_the_start_waits_once_for_the_lora_kernels(checkpoint: Path) -> None:
    assert waited_s() < 1  # no job was sent, so no answer is expected
    kernel_process.send_job(options_for(checkpoint), shapes)
    assert child().has_job
    assert waited_s() > 1
    assert child().is_running
    assert waited_s() < 1
    kernel_process.send_job(options_for(checkpoint), shapes)  # is not sent: a process does one job
    assert waited_s() < 1


@pytest.mark.usefixtures("running")
def test_the_start_does_not_wait_longer_than_the_limit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_process, "MAX_WAIT_S", 0.1)
    kernel_process.send_job(options_for(checkpoint), shapes)
    assert 0.09 < waited_s() < 1


@pytest.mark.usefixtures("running")
def test_the_start_does_not_wait_for_an_engine_without_lora(checkpoint: Path) -> None:
    kernel_process.send_job(options_for(checkpoint, enable_lora=False), shapes)
    assert child().has_job
    assert waited_s() < 1


def test_a_split_engine_ends_the_process_and_does_not_wait(
    checkpoint: Path, running: subprocess.Popen[bytes]
) -> None:
    kernel_process.send_job(options_for(checkpoint, tensor_parallel_size=2), shapes)
    assert waited_s() < 1
    assert running.wait(10) == 0


@pytest.mark.usefixtures("no_process")
def test_a_process_that_is_started_late_leaves_the_lora_kernels_to_this_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[KernelJob] = []
    monkeypatch.setattr(kernel_process, "_can_help", lambda: True)
    monkeypatch.setattr(kernel_process._Child, "send", lambda _self, job: sent.append(job))
    assert "vllm" in sys.modules
    kernel_process.send_job(options_for(checkpoint), shapes)
    assert [job.slot_shapes for job in sent] == [[]]
    monkeypatch.delitem(sys.modules, "vllm")
    end_process()
    monkeypatch.setattr(kernel_process, "_child", None)
    kernel_process.send_job(options_for(checkpoint), shapes)
    assert sent[1].slot_shapes == sorted(SHAPES)


def test_a_job_that_cannot_be_sent_does_not_stop_the_start(
    checkpoint: Path, running: subprocess.Popen[bytes]
) -> None:
    graphs = {"cudagraph_capture_sizes": [object()]}  # cannot be written as JSON
    kernel_process.send_job(options_for(checkpoint, compilation_config=graphs), shapes)
    assert waited_s() < 1
    running.kill()
    running.wait()
    kernel_process.send_job(options_for(checkpoint), shapes)
    assert waited_s() < 1


def test_the_process_chooses_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that this process has made is not a choice of the user."""
    monkeypatch.setenv(lora_tables.FOLDER_VARIABLE, "/tables")
    assert kernel_process._child_environment()[lora_tables.FOLDER_VARIABLE] == "/tables"
    monkeypatch.setitem(lora_tables._created_folders, "any", "/tables")
    assert lora_tables.FOLDER_VARIABLE not in kernel_process._child_environment()


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


def test_the_process_ends_with_the_one_that_started_it() -> None:
    program = (
        "import atexit, queue, threading\n"
        "atexit.register(print, 'removed', flush=True)\n"
        "from toolkit.engine import kernel_worker\n"
        "jobs = queue.SimpleQueue()\n"
        "threading.Thread(target=kernel_worker._read_jobs, args=(jobs,), daemon=True).start()\n"
        "print(jobs.get(), end='', flush=True)\n"
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
        assert process.stdout.read() == b"removed\n"  # temporary files are removed at exit
