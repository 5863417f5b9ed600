"""Reading NVML through the structs of pynvml: a query has a value, is unsupported or fails. Also a
lost card and a driver that hangs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import nvml as fake_nvml
import pytest

from toolkit.gpu import nvml
from toolkit.gpu.reading import succeeded
from toolkit.gpu.snapshot import take_snapshot


def test_every_query_of_a_healthy_card_returns_the_recorded_value(pynvml_library: Any) -> None:
    node = cases.base("h200")
    fake_nvml.install(node)
    (row, slices), *_ = nvml.read().gpus
    assert slices == []
    recorded = node["gpus"][0]
    assert {name: reading.to_json() for name, reading in row.items()} == {
        name: recorded[name] for name in recorded if name not in ("index", "slices")
    }


def test_a_lost_card_affects_only_its_own_readings(pynvml_library: Any) -> None:
    fake_nvml.install(cases.load("h100x8-lost").node)
    snapshot = take_snapshot()
    assert [gpu.lost for gpu in snapshot.gpus] == [False] * 5 + [True] + [False] * 2
    assert snapshot.gpus[5].state.reason == "GPU is lost"
    assert snapshot.gpus[6].total_bytes == 81559 << 20


def test_unsupported_and_failed_queries_are_distinguished(pynvml_library: Any) -> None:
    node = cases.load("a100-unknown-errors").node
    fake_nvml.install(node)
    gpu = take_snapshot().gpus[0]
    assert gpu.ecc_uncorrected.failed
    assert gpu.ecc_uncorrected.code == 999
    assert gpu.retired_pages.unsupported
    assert not gpu.retired_pages.failed


@pytest.mark.parametrize("code", range(1, 31))
def test_every_error_code_of_the_start_is_a_reading(code: int, pynvml_library: Any) -> None:
    node = cases.base("h200")
    node["driver"]["nvml"] = {"failed": "whatever", "code": code}
    fake_nvml.install(node)
    answers = nvml.read()
    assert answers.gpus == []
    assert not answers.start.has_value
    assert answers.start.code == code


def test_a_driver_that_hangs_is_a_failed_reading(pynvml_library: Any) -> None:
    fake_nvml.install(cases.base("h200"), {"hang_s": 1.5})
    start = time.perf_counter()
    answers = nvml.read(deadline_s=0.2)
    assert time.perf_counter() - start < 1.0
    assert answers.start.failed
    assert "0.2 s" in str(answers.start.reason)
    time.sleep(1.6)  # the thread must end before pynvml is restored


def test_old_calls_are_used_if_the_driver_lacks_the_new_ones(pynvml_library: Any) -> None:
    case = cases.load("h200-memory-v1")
    fake = fake_nvml.install(case.node, case.quirks)
    gpu = take_snapshot().gpus[0]
    assert gpu.memory.value is not None
    assert gpu.memory.value["version"] == 1
    assert gpu.clock_reasons == succeeded(1)
    assert gpu.temperature_c == succeeded(33)
    assert fake.calls["nvmlDeviceGetMemoryInfo"] == 1
    assert fake.calls["nvmlDeviceGetCurrentClocksThrottleReasons"] == 1


def test_the_fabric_query_falls_back_to_older_versions(pynvml_library: Any) -> None:
    node = cases.base("h100x8")
    node["gpus"][0]["fabric"]["value"]["health"] = None
    fake_nvml.install(node)
    first, second = take_snapshot().gpus[:2]
    assert first.fabric == succeeded({"state": 3, "status": 0, "health": None})
    assert second.fabric == succeeded({"state": 3, "status": 0, "health": 1})


def test_no_setting_is_changed_and_every_init_has_a_shutdown(pynvml_library: Any) -> None:
    fake = fake_nvml.install(cases.base("h100x8"))
    take_snapshot()
    assert not [name for name in fake.calls if "Set" in name or "Clear" in name or "Reset" in name]
    # This call would open libcuda.so.1 in the process.
    assert not [name for name in fake.calls if "CudaDriverVersion" in name]
    assert fake.calls["nvmlInitWithFlags"] == fake.calls["nvmlShutdown"] == 1


def test_slices_have_their_own_snapshots(pynvml_library: Any) -> None:
    fake_nvml.install(cases.load("h200-mig").node)
    (card,) = take_snapshot().gpus
    assert [part.label for part in card.slices] == ["GPU 0 MIG 0", "GPU 0 MIG 1"]
    assert [part.total_bytes for part in card.slices] == [71424 << 20, 16384 << 20]
    assert card.slices[1].capability == (9, 0)


def test_reading_a_node_loads_neither_libcuda_nor_torch() -> None:
    program = """
import sys
from toolkit.gpu import checks, snapshot
checks.run_checks(snapshot.take_snapshot(model="example/none"))
maps = open("/proc/self/maps").read()
assert "libcuda" not in maps and "libtorch" not in maps, maps
heavy = {"torch", "transformers", "vllm", "peft", "trl", "yaml", "jsonschema", "numpy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path("/"))
