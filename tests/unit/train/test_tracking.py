"""Trackers: real TensorBoard files, a resumed run, and trackers that raise, hang or are slow."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainer_helpers import arguments

sys.path.append(str(Path(__file__).resolve().parents[2] / "acceptance"))

import train_world

from toolkit.config import load_run
from toolkit.train import tracking
from toolkit.train.run import run
from toolkit.train.run_context import Options
from toolkit.train.tracking import Tracking, flat_completion, run_info, tracker_names
from toolkit.train.tracking.to_tensorboard import markdown
from toolkit.train.tracking.to_upstream import UpstreamTracker
from toolkit.train.tracking.tracker_thread import TrackerThread

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return train_world.make_run_files(tmp_path_factory.mktemp("tracking"), steps=STEPS)


def train_run(world, out, *more):
    """(folder, printed text) of a run in this process."""
    printed = io.StringIO()
    overrides = (f"runtime.output_dir={out}", "reward.isolate=false", *more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(load_run(str(world), list(overrides)), Options(out=printed, evaluate=False))
    return Path(out), printed.getvalue()


@pytest.fixture(scope="module")
def tensorboard(world, tmp_path_factory):
    """A finished run with TensorBoard: (folder, printed text)."""
    out = tmp_path_factory.mktemp("runs") / "numeric-r4"
    folder, printed = train_run(world, out, "grpo.report_to=tensorboard")
    return folder, printed


def scalars(folder):
    """({name: [(step, value), ...]} as in TensorBoard, names of the texts, the accumulator)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = {n: [(e.step, e.value) for e in events.Scalars(n)] for n in tags["scalars"]}
    return found, tags["tensors"], events


def test_tensorboard_has_every_metric_under_its_name(tensorboard):
    folder, printed = tensorboard
    rows = train_world.read_rows(folder)
    found, texts, events = scalars(folder)
    assert found["reward"] == [(r["step"], pytest.approx(r["reward"])) for r in rows]
    named_in_rows = {k for row in rows for k, v in row.items() if isinstance(v, (int, float))}
    assert named_in_rows - {"step"} <= set(found)
    assert len(found["timing/step_s"]) == STEPS
    assert f"tracker tensorboard: tensorboard --logdir {folder / 'tensorboard'}" in printed
    assert {"config/text_summary", "completions/text_summary"} <= set(texts)
    table = events.Tensors("completions/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.startswith("| step | prompt | completion | reward | advantage | reward/ones")
    shown = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"learning_rate": 0.01' in shown


@pytest.mark.slow
def test_trackers_change_nothing_in_the_run(tensorboard, world, tmp_path):
    plain, _ = train_run(world, tmp_path / "plain")
    assert train_world.result_digests(plain) == train_world.result_digests(tensorboard[0])


def test_a_resumed_run_continues_the_same_tracked_run(tensorboard, world):
    """Its steps after the checkpoint replace the steps that were logged before."""
    folder, _ = tensorboard
    before = json.loads((folder / "trackers.json").read_text())
    train_run(
        world, folder, "grpo.report_to=tensorboard", f"runtime.resume={folder / 'checkpoint-2'}"
    )
    found, _, _ = scalars(folder)
    assert [step for step, _ in found["reward"]] == list(range(1, STEPS + 1))
    assert json.loads((folder / "trackers.json").read_text()) == before


@pytest.mark.parametrize("kind", ["pipe", "device", "nested", "list", "huge"])
def test_an_invalid_trackers_json_is_ignored(tmp_path, kind):
    path = tmp_path / "trackers.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        texts = {"nested": "[" * 200_000, "list": "[1]", "huge": '{"run_id": 1%s}' % ("0" * 5000)}
        path.write_text(texts[kind])
    assert run_info._read_ids(tmp_path) == {}


class FailingTracker:
    destination = ""

    def __init__(self, start):
        raise ConnectionError("no route to api.example.org")


class HangingTracker:
    """A tracker whose log_row does not return until the test ends."""

    destination = "opened"
    test_has_ended = threading.Event()

    def __init__(self, start):
        pass

    def log_row(self, step, numbers):
        self.test_has_ended.wait(600)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param(
            FailingTracker,
            "tracker wandb: could not start: ConnectionError: no route to api.example.org",
            marks=pytest.mark.slow,
        ),
        (HangingTracker, "tracker wandb: did not finish in time"),
    ],
)
def test_a_tracker_that_fails_or_hangs_does_not_stop_the_run(
    world, tmp_path, monkeypatch, kind, message
):
    monkeypatch.setitem(tracking.TRACKER_CLASSES, "wandb", kind)
    monkeypatch.setattr(tracking, "CLOSE_LIMIT_S", 0.2)
    HangingTracker.test_has_ended.clear()
    try:
        folder, printed = train_run(world, tmp_path / "run", "grpo.report_to=wandb")
    finally:
        HangingTracker.test_has_ended.set()
    assert message in printed
    assert "metrics.jsonl contains every row" in printed
    assert len(train_world.read_rows(folder)) == STEPS
    assert (folder / "adapter/adapter_model.safetensors").is_file()


class RecordingTracker:
    destination = "here"

    def __init__(self, fails=(), slow_s=0.0):
        self.fails, self.slow_s, self.calls, self.closed = list(fails), slow_s, [], False
        self.begun = threading.Event()

    def log_row(self, step, numbers):
        self.begun.set()
        time.sleep(self.slow_s)
        if step in self.fails:
            raise OSError(f"503 at {step}")
        self.calls.append((step, numbers))

    def log_table(self, step, rows):
        self.calls.append((step, rows))

    def close(self):
        self.closed = True


def send_steps(tracker, steps, total=100):
    printed = []
    tracking_run = Tracking([TrackerThread("mine", lambda: tracker)], printed.append, total)
    for step in range(1, steps + 1):
        tracking_run.log_row(
            {"step": step, "reward": 0.5, "kl": None}, {"step": step, "step_s": 1.0}
        )
        tracker.begun.wait(30)
    tracking_run.close(stopped=False)
    return printed


def test_a_failed_call_loses_only_its_row():
    tracker = RecordingTracker(fails=(2, 4))
    printed = send_steps(tracker, 5)
    assert [step for step, _ in tracker.calls] == [1, 3, 5]
    assert tracker.calls[0][1] == {"reward": 0.5, "timing/step_s": 1.0}
    assert printed == ["tracker mine: here"]
    assert tracker.closed


def test_a_tracker_that_cannot_start_is_reported_once():
    printed = []
    tracking_run = Tracking(
        [TrackerThread("mine", lambda: FailingTracker(None))], printed.append, 100
    )
    for step in (1, 2):
        tracking_run.log_row({"step": step, "reward": 0.5}, None)
    tracking_run.close(stopped=True)
    assert len(printed) == 1
    assert printed[0].startswith("tracker mine: could not start: ConnectionError: no route")
    assert printed[0].endswith(
        "the run continues without this tracker, and metrics.jsonl contains every row"
    )


def test_five_failures_in_a_row_end_the_tracker():
    tracker = RecordingTracker(fails=range(3, 100))
    printed = send_steps(tracker, 30)
    assert [step for step, _ in tracker.calls] == [1, 2]
    assert any("failed 5 times in a row: OSError: 503 at 7" in line for line in printed)


def test_the_number_of_dropped_updates_of_a_slow_tracker_is_reported(monkeypatch):
    monkeypatch.setattr(tracking.tracker_thread, "MAX_QUEUED_CALLS", 3)
    monkeypatch.setattr(tracking, "CLOSE_LIMIT_S", 0.1)
    printed = send_steps(RecordingTracker(slow_s=1.0), 20)
    assert any("did not finish in time" in line for line in printed)
    assert any("too slow: 16 updates" in line for line in printed)


def test_completions_are_sent_for_a_few_steps():
    tracker = RecordingTracker()
    tracking_run = Tracking([TrackerThread("mine", lambda: tracker)], print, 100)
    for step in range(1, 101):
        tracking_run.log_completions(step, [{"step": step, "completion": "a"}] * 40)
    tracking_run.close(stopped=False)
    assert [step for step, _ in tracker.calls] == [1, *range(5, 101, 5)]
    assert all(len(rows) == 16 for _, rows in tracker.calls)


def test_tables_hold_flat_columns_and_no_markup():
    row = {"prompt": [{"role": "user", "content": "1|2"}], "rewards": {"ones": 0.25}, "extra": {}}
    found = flat_completion(row)
    assert found == {"prompt": '[{"role": "user", "content": "1|2"}]', "reward/ones": 0.25}
    table = markdown([{"completion": "<b>|**x**\n"}])
    assert table.splitlines()[2] == "| &lt;b&gt;&#124;&#42;&#42;x&#42;&#42;<br> |"


def test_other_trackers_use_the_callbacks_of_transformers(tmp_path, monkeypatch):
    """The test uses transformers' callback for TensorBoard, because it needs no account."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import TrainerControl, TrainerState

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "upstream"))
    trainer = SimpleNamespace(
        args=arguments(tmp_path),
        state=TrainerState(is_world_process_zero=True, global_step=7),
        control=TrainerControl(),
        model=SimpleNamespace(config=None),
    )
    tracker = UpstreamTracker("tensorboard", trainer)
    tracker.log_row(3, {"reward": 0.5})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "upstream"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/reward")] == [(3, 0.5)]
    assert trainer.state.global_step == 7


def test_names_of_report_to():
    assert tracker_names(None) == tracker_names("none") == tracker_names(["none"]) == []
    assert tracker_names(("wandb", "tensorboard")) == ["wandb", "tensorboard"]
    assert "tensorboard" in tracker_names("all")
