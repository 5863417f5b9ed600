"""The message of a run about unused GPUs, and the number of processes for all visible GPUs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from toolkit.cli.train_run import ProcessCount
from toolkit.gpu import snapshot
from toolkit.gpu.snapshot_json import node_from_json
from toolkit.train.run_context import unused_gpus

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import cases

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot


def node(name: str, **environment: str) -> NodeSnapshot:
    snapshot_of_case = node_from_json(cases.load(name).node)
    return replace(snapshot_of_case, environment={**snapshot_of_case.environment, **environment})


def test_a_run_with_one_process_names_the_option_for_all_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (line,) = unused_gpus(node("h100x8-healthy"))
    assert line == (
        "uses GPU 0 of 8 visible GPUs; 7 of the others are free; use --nproc-per-node auto"
        " to train on all 8"
    )
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert unused_gpus(node("h100x8-healthy")) == []


def test_a_run_with_one_visible_gpu_prints_nothing() -> None:
    assert unused_gpus(node("h100x8-healthy", CUDA_VISIBLE_DEVICES="3")) == []
    assert unused_gpus(node("h200-mig")) == []
    assert unused_gpus(node("cpu")) == []


def test_gpus_in_use_do_not_count_as_free() -> None:
    healthy = node("h100x8-healthy")
    total = healthy.gpus[1].total_bytes
    assert total is not None

    def with_gpus_in_use(*indices: int) -> NodeSnapshot:
        def in_use(gpu: snapshot.GpuSnapshot) -> snapshot.GpuSnapshot:
            value = {**(gpu.memory.value or {}), "free": total // 2}
            return replace(gpu, memory=replace(gpu.memory, value=value))

        gpus = tuple(in_use(gpu) if gpu.index in indices else gpu for gpu in healthy.gpus)
        return replace(healthy, gpus=gpus)

    assert (
        "6 of the others are free; to use several, list the free ones in CUDA_"
        in unused_gpus(with_gpus_in_use(1))[0]
    )
    assert unused_gpus(with_gpus_in_use(*range(1, 8))) == [
        "uses GPU 0 of 8 visible GPUs; 0 of the others are free"
    ]


@pytest.mark.parametrize(
    ("name", "visible", "count"),
    [
        ("h100x8-healthy", None, 8),
        ("h100x8-healthy", "2,5", 2),
        ("h100x8-healthy", "", 1),
        ("h200-mig", None, 1),
        ("cpu", None, 1),
    ],
)
def test_auto_starts_one_process_per_visible_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, visible: str | None, count: int
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(snapshot, "take_snapshot", lambda: node(name, **environment))
    kind = ProcessCount(min=1)
    assert kind.convert("auto", None, None) == count
    assert kind.convert("3", None, None) == 3
