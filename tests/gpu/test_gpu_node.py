"""The node checks on a machine with a GPU: their values agree with nvidia-smi, they do not
initialize CUDA, and they are fast.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not Path("/proc/driver/nvidia/version").exists(), reason="no NVIDIA driver is loaded here"
    ),
]
ENVCHECK = [sys.executable, "-c", "from toolkit.cli.envcheck import main; main()"]
NODE = ("--only", "driver", "--only", "devices", "--only", "memory", "--only", "health",
        "--only", "speed")  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ENVCHECK, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[
        :-1
    ]


def test_the_probe_agrees_with_nvidia_smi() -> None:
    result = run("probe", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    gpus = report["gpus"]
    assert [gpu["name"]["value"] for gpu in gpus] == nvidia_smi("name")
    assert [gpu["uuid"]["value"] for gpu in gpus] == nvidia_smi("uuid")
    totals = [gpu["memory"]["value"]["total"] >> 20 for gpu in gpus]
    assert totals == [int(text) for text in nvidia_smi("memory.total")]
    assert report["driver"]["version"]["value"] == nvidia_smi("driver_version")[0]


def test_the_checks_of_a_node_take_less_than_two_seconds() -> None:
    run("check", *NODE)  # wakes a card without persistence mode
    start = time.perf_counter()
    result = run("check", *NODE, "--json")
    assert time.perf_counter() - start < 2.0
    report = json.loads(result.stdout)
    wrong = [row for row in report["checks"] if row["verdict"] == "fail" and row["blame"] == "node"]
    assert wrong == [], "either this node is bad or a check is wrong"


def test_a_replayed_recording_gives_the_same_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    assert run("record", str(file)).returncode == 0
    text = file.read_text()
    assert not [uuid for uuid in nvidia_smi("uuid") if uuid in text]
    result = run("replay", str(file))
    assert "as recorded:" in result.stdout, result.stdout
    assert result.returncode == json.loads(text)["exit_code"]


def test_cuda_is_not_initialised() -> None:
    """NVML 580 maps libcuda itself, so the test does not check the mapping. It checks that no code
    called cuInit, because a process without cuInit has no CUDA context.

    If a process has not called cuInit, every context call of the driver returns
    CUDA_ERROR_NOT_INITIALIZED (3).
    """
    program = """
import ctypes
from toolkit.gpu import checks, snapshot
node = snapshot.take_snapshot()
assert node.gpus
checks.run_checks(node)
driver = ctypes.CDLL("libcuda.so.1")
assert driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) == 3
assert driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 3
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
