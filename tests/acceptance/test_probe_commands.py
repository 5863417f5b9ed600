"""The commands envcheck probe, check, record and replay: output, exit codes and files."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import cases


def test_a_lost_gpu_affects_only_its_own_row(tmp_path: Path) -> None:
    result = cases.load("h100x8-lost").envcheck(tmp_path, "probe")
    assert result.returncode == 0
    rows = result.stdout.splitlines()[2:]
    assert len(rows) == 8
    assert rows[5].split() == ["5", "-", "?", "?", "?", "lost", "(GPU", "is", "lost)"]
    assert rows[6].startswith("6    5     H100 80GB HBM3")
    assert rows[6].endswith("ok")
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_each_reason_for_no_gpu_has_its_own_message(tmp_path: Path) -> None:
    reasons = {
        "cpu": "no NVIDIA GPU on this node",
        "no-driver": "libnvidia-ml.so.1 is not installed",
        "driver-not-loaded": "kernel module is not loaded",
        "driver-mismatch": "do not match",
        "no-permission": "refuses this user",
        "serves-none": "reports none of them",
        "docker-not-passed-in": "--gpus all",
        "kubernetes-not-passed-in": "nvidia.com/gpu: 1",
    }
    messages = {}
    for name, words in reasons.items():
        result = cases.load(name).envcheck(tmp_path, "probe")
        assert result.returncode == 3
        assert words in result.stdout
        assert "fix:" in result.stdout
        messages[name] = result.stdout
    assert len(set(messages.values())) == len(reasons)


def test_probe_describes_this_machine(tmp_path: Path) -> None:
    """Without a fake driver, the exit code depends on whether this machine has a GPU."""
    result = cases.load("cpu").envcheck(tmp_path, "probe", "--json", fake=False)
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["gpus"] else 3)


def test_watch_repeats_the_probe(tmp_path: Path) -> None:
    result = cases.load("h200-healthy").envcheck(
        tmp_path, "probe", "--watch", "--interval", "0.1", "--count", "3"
    )
    assert result.returncode == 0
    assert result.stdout.count("driver 580.159.04, CUDA 13.0") == 3
    stream = cases.load("h200-healthy").envcheck(
        tmp_path, "probe", "--watch", "--json", "--interval", "0.1", "--count", "2"
    )
    assert [json.loads(line)["kind"] for line in stream.stdout.splitlines()] == ["probe"] * 2


def test_ctrl_c_ends_watch_without_an_error(tmp_path: Path) -> None:
    process = cases.load("h200-healthy").start(tmp_path, "probe", "--watch", "--interval", "30")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("driver 580")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "")


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    process = cases.load("h200-healthy").start(
        tmp_path, "probe", "--watch", "--interval", "0.1", "--count", "100"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_metrics_are_written_atomically_and_are_readable(tmp_path: Path) -> None:
    metrics = tmp_path / "envcheck.prom"
    result = cases.load("a100-remap-pending").envcheck(
        tmp_path, "check", "--prometheus", str(metrics)
    )
    assert result.returncode == 3
    families = {one.name: one for one in text_string_to_metric_families(metrics.read_text())}
    assert families["envcheck_exit_code"].samples[0].value == 3
    assert families["envcheck_gpu_row_remap_pending"].samples[0].value == 1
    assert metrics.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_only_and_skip_select_checks(tmp_path: Path) -> None:
    case = cases.load("a100-remap-pending")
    only = case.envcheck(tmp_path, "check", "--json", "--only", "host", "--only", "health.ecc")
    ids = [row["id"] for row in json.loads(only.stdout)["checks"]]
    assert only.returncode == 0
    assert {name.partition(".")[0] for name in ids} == {"host", "health"}
    assert [name for name in ids if name.startswith("health")] == ["health.ecc"]
    assert case.envcheck(tmp_path, "check", "--skip", "health.rows").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--only", "helth"], "did you mean health"),
        (["check", "--require", "cc>=nine"], "has an unknown form"),
        (["check", "--require", "free>=1.2.3GiB"], "has an unknown form"),
        (["check", "--require", "driver>=..."], "has an unknown form"),
        (["check", "--prometheus", "absent/node.prom"], "absent/node.prom: cannot be written: No"),
        (["record", "/proc/node.record.json"], "cannot be written"),
        (["record", "pipe"], "cannot be written: it is not a regular file"),
        (["check", "--prometheus", "pipe"], "cannot be written: it is not a regular file"),
        (["check", "--config", "absent.yaml"], "does not exist"),
        (["check", "--lock", "node.json"], "no name==version line"),
        (["replay", "node.json"], "not a recording"),
        (["probe", "--interval", "0"], "--interval"),
    ],
)
def test_a_usage_error_is_exit_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = cases.load("cpu").envcheck(tmp_path, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_gpu_is_an_error_of_the_user(tmp_path: Path) -> None:
    result = cases.load("h200-healthy").envcheck(tmp_path, "check", "--require", "h300")
    assert result.returncode == 1
    assert "h200" in result.stderr


@pytest.mark.parametrize(
    "name", ["h200-mig", "h100x8-lost-required", "h200-tenant", "cpu-four-bit"]
)
def test_a_recording_is_redacted_and_has_the_same_results_elsewhere(
    name: str, tmp_path: Path
) -> None:
    case = cases.load(name)
    config = case.run_file(tmp_path)
    chosen = (*case.arguments, *(("--config", str(config)) if config else ()))
    written = case.envcheck(tmp_path, "record", "node.record.json", *chosen)
    assert written.returncode == 0, written.stderr
    text = (tmp_path / "node.record.json").read_text()
    uuids = [gpu["uuid"].get("value", "none") for gpu in case.node["gpus"]]
    assert not [uuid for uuid in uuids if uuid in text]
    assert "9000001" not in text
    assert socket.gethostname() not in json.loads(text)["node"]["host"]

    replayed = case.envcheck(tmp_path, "replay", "node.record.json", fake=False)
    assert replayed.returncode == case.expect["exit_code"], replayed.stdout
    assert "as recorded:" in replayed.stdout
    again = case.envcheck(tmp_path, "replay", "node.record.json", "--json", fake=False)
    verdicts = {row["id"]: row["verdict"] for row in json.loads(again.stdout)["checks"]}
    assert verdicts.items() >= case.expect["not_ok"].items()


def test_a_node_of_eight_is_checked_in_two_seconds(tmp_path: Path) -> None:
    case = cases.load("h100x8-healthy")
    config = cases.load("t4-bfloat16").run_file(tmp_path)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = case.envcheck(tmp_path, "check", "--config", str(config), "--json")
        times.append(time.perf_counter() - start)
        assert result.returncode in (0, 1), result.stderr
    assert min(times) < 2.0


def test_checking_writes_nothing(tmp_path: Path) -> None:
    """The commands create or change no file in the working folder and in HOME."""
    home = tmp_path / "home"
    home.mkdir()
    case = cases.load("h200-healthy")
    config = cases.load("t4-bfloat16").run_file(tmp_path)
    case.envcheck(tmp_path, "probe")  # writes node.json, a file of the test itself
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    os.environ["HOME"], old = str(home), os.environ.get("HOME", "/root")
    try:
        for command in (["check", "--config", str(config)], ["probe"], ["check", "--node"]):
            case.envcheck(tmp_path, *command)
    finally:
        os.environ["HOME"] = old
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    node = tmp_path / "node.json"
    assert {path: stamp for path, stamp in after.items() if path != node} == {
        path: stamp for path, stamp in before.items() if path != node
    }


RECORDED = Path(__file__).parents[1] / "fixtures/recordings/h100.json"


def test_the_recording_of_a_real_h100_has_the_results_of_that_node(tmp_path: Path) -> None:
    case = cases.load("cpu")
    result = case.envcheck(tmp_path, "replay", str(RECORDED), "--json", fake=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    verdicts = {row["id"]: row["verdict"] for row in report["checks"]}
    recorded = json.loads(RECORDED.read_text())["verdicts"]
    assert verdicts == recorded
    assert verdicts["driver.cuda"] == verdicts["health.fabric"] == "ok"
