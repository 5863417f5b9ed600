"""A run with the real W&B, trackio and MLflow and without a network: the data that each tracker
stores.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import train_world

pytestmark = pytest.mark.slow
NAMES = ("wandb", "trackio", "mlflow")
missing = [name for name in NAMES if find_spec(name) is None]
needs = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """(run folder, trackio's folder, output) of a run with all three trackers that was resumed from
    step 2.
    """
    folder = tmp_path_factory.mktemp("trackers")
    world = train_world.make_run_files(folder, steps=4)
    arguments = (
        "train", world, "--no-evaluate", "--set", "grpo.report_to=[wandb, trackio, mlflow]",
        "--set", "grpo.project=sums", "--set", "grpo.run_name=first",
    )  # fmt: skip
    more = {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_API_KEY": "", "HOME": str(folder)}
    result = train_world.run_toolkit(*arguments, **more)
    assert result.returncode == 0, result.stderr
    again = train_world.run_toolkit(*arguments, "--resume", folder / "run/checkpoint-2", **more)
    assert again.returncode == 0, again.stderr
    return folder / "run", folder / "trackio", result.stdout + result.stderr


@needs
def test_mlflow_has_one_run_with_all_steps(tracked):
    script = f"""
import os, json
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
import mlflow
client = mlflow.MlflowClient(tracking_uri={(tracked[0] / "mlruns").as_uri()!r})
found = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
run = found[0]
history = client.get_metric_history(run.info.run_id, "reward")
print(json.dumps([len(found), run.info.run_name, run.info.status, run.data.params["lora.r"],
    sorted({{m.step for m in history}}),
    [a.path for a in client.list_artifacts(run.info.run_id, "completions")]]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    count, name, status, rank, steps, tables = json.loads(result.stdout.splitlines()[-1])
    assert (count, name, status, rank) == (1, "first", "FINISHED", "4")
    assert steps == [1, 2, 3, 4]
    assert "completions/step-000001.json" in tables


@needs
def test_wandb_is_offline_and_resumes_the_same_run(tracked):
    folders = list((tracked[0] / "wandb").glob("offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    run_id = json.loads((tracked[0] / "trackers.json").read_text())["run_id"]
    assert len(folders) == 2
    assert ids == {run_id}
    assert "wandb sync" in tracked[2]


@needs
def test_a_tracker_that_never_answers_does_not_delay_the_end_of_a_run(tmp_path):
    """W&B waits for its server also when the interpreter exits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        world = train_world.make_run_files(tmp_path, steps=2)
        result = train_world.run_toolkit(
            "train", world, "--no-evaluate", "--set", "grpo.report_to=wandb", timeout=400,
            WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
            WANDB_API_KEY="a" * 40,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "tracker wandb: did not finish in time" in result.stdout
    assert len(train_world.read_rows(tmp_path / "run")) == 2


@needs
def test_trackio_is_local(tracked):
    files = list(Path(tracked[1]).rglob("*.db"))
    assert files, list(Path(tracked[1]).rglob("*"))
    with sqlite3.connect(files[0]) as base:
        tables = {row[0] for row in base.execute("select name from sqlite_master")}
        assert "metrics" in tables
        names = {row[0] for row in base.execute("select run_name from metrics")}
    run_id = json.loads((tracked[0] / "trackers.json").read_text())["run_id"]
    assert names == {f"first-{run_id}"}
