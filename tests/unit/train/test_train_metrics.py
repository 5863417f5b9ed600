"""The logs of a run: the names in a row, the truncation on resume, and the printed lines."""

from __future__ import annotations

import io
import json
import math
import os
import re

import pytest

from toolkit.base.errors import ConfigError
from toolkit.train.report.metrics_log import (
    LOG_FILES,
    Journal,
    metrics_row,
    shorten_message,
    to_json_value,
)
from toolkit.train.report.progress import Progress, step_line

TIMINGS = {"tokens_per_s": 1234.0, "step_s": 0.5}


def test_a_row_has_the_leading_metrics_first_then_all_others_in_order():
    logs = {
        "loss": 0.5,
        "z": 1,
        "completions/mean_length": 3.5,
        "reward": 0.25,
        "a/b": 2,
        "step_time": 9.0,
    }
    assert list(metrics_row(7, logs).items()) == [
        ("step", 7),
        ("reward", 0.25),
        ("loss", 0.5),
        ("completion_length", 3.5),
        ("a/b", 2),
        ("z", 1),
    ]


def test_an_evaluation_has_its_own_names_and_no_timings():
    logs = {
        "eval_reward": 0.5,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 2.0,
        "eval_completions/mean_length": 4.0,
        "epoch": 1.0,
    }
    assert metrics_row(2, logs) == {
        "step": 2,
        "epoch": 1.0,
        "eval/completion_length": 4.0,
        "eval/reward": 0.5,
    }


def test_nan_and_infinity_are_null():
    assert to_json_value({"a": math.nan, "b": [math.inf, 1], "c": (True, None, "x")}) == {
        "a": None,
        "b": [None, 1],
        "c": [True, None, "x"],
    }


def test_the_journal_is_truncated_to_the_positions_of_the_checkpoint(tmp_path):
    journal = Journal(tmp_path)
    journal.write("metrics.jsonl", {"step": 1})
    known = journal.positions()
    journal.write("metrics.jsonl", {"step": 2})
    journal.write("completions.jsonl", {"completion": "ä"})
    journal.close()
    again = Journal(tmp_path, known)
    again.write("metrics.jsonl", {"step": 2, "again": True})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2, "again": True}]
    assert (tmp_path / "completions.jsonl").read_bytes() == b""


def test_a_run_that_starts_again_has_empty_logs(tmp_path):
    for name in LOG_FILES:
        (tmp_path / name).write_text("old\n")
    Journal(tmp_path).close()
    assert all((tmp_path / name).read_bytes() == b"" for name in LOG_FILES)


def test_a_log_must_be_a_regular_file(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for make in (lambda p: p.symlink_to(victim), os.mkfifo, os.mkdir):
        run_dir = tmp_path / f"run-{make.__name__}"
        run_dir.mkdir()
        make(run_dir / "metrics.jsonl")
        with pytest.raises(ConfigError, match="is not a regular file"):
            Journal(run_dir)
    assert victim.read_text() == "precious"


def test_a_change_of_a_log_by_another_process_is_noticed(tmp_path):
    journal = Journal(tmp_path)
    journal.write("metrics.jsonl", {"step \ud800": 1})
    assert journal.changed_logs() == []
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step ?": 1}\n'
    with (tmp_path / "metrics.jsonl").open("a") as other:
        other.write("{}\n")
    os.truncate(tmp_path / "timings.jsonl", 0)
    assert journal.changed_logs() == ["metrics.jsonl"]
    journal.close()


def test_a_stream_that_is_not_a_terminal_gets_aligned_lines():
    stream = io.StringIO()
    progress = Progress(stream, total=100)
    for step in range(1, 101):
        row = {"step": step, "reward": step / 100, "reward_std": 0.5, "loss": -0.001, "kl": None}
        progress(row, TIMINGS)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 35  # the first step, every third step, and the last step
    assert "\r" not in stream.getvalue()
    assert len({line.index("loss") for line in lines}) == 1
    assert lines[-1].startswith("step 100/100  reward  1.000 ± 0.500  loss  -0.0010")
    assert lines[-1].endswith("left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "lines"), [("xterm", 100), ("dumb", 35)])
def test_lines_are_overwritten_only_in_a_terminal_that_supports_this(monkeypatch, kind, lines):
    monkeypatch.setenv("TERM", kind)
    stream = Terminal()
    progress = Progress(stream, total=100)
    for step in range(1, 101):
        progress({"step": step}, TIMINGS)
    assert len(re.findall("step +[0-9]+/100", stream.getvalue())) == lines
    assert ("\r\x1b[K" in stream.getvalue()) is (kind == "xterm")
    assert stream.getvalue().count("\n") == 35


def test_every_nth_step_is_printed_if_the_run_file_asks_for_it():
    stream = io.StringIO()
    progress = Progress(stream, total=20, every=10)
    for step in range(1, 21):
        progress({"step": step}, TIMINGS)
    assert [line[:10] for line in stream.getvalue().splitlines()] == [
        "step  1/20",
        "step 10/20",
        "step 20/20",
    ]


def test_the_line_of_a_skipped_step_has_the_reason():
    drawn = {"dynamic_sampling/no_spread_before": 0.5, "dynamic_sampling/no_spread_after": 0.125}
    assert step_line({"step": 1, **drawn}, TIMINGS, 10, 3.0).endswith("no spread 50% -> 12%")
    line = step_line({"step": 1, "loss": None, "skipped": 1.0}, TIMINGS, 10, 3.0)
    assert "skipped: not finite" in line
    assert "loss        -" in line


def test_an_evaluation_line():
    stream = io.StringIO()
    Progress(stream, total=5)({"step": 5, "eval/reward": 0.5, "eval/completion_length": 3.25}, None)
    assert stream.getvalue() == "evaluation at step 5: reward 0.500, length 3.2\n"


def test_a_huge_prompt_or_completion_keeps_its_start_and_its_end():
    text = "a" * 300_000 + "b" * 300_000
    kept = shorten_message(text)
    assert kept == "a" * 100_000 + "... (400000 characters left out) ..." + "b" * 100_000
    assert shorten_message("a" * 200_000) == "a" * 200_000
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}] * 3
    assert len(str(shorten_message(chat))) < 201_000
    assert len(shorten_message([{}] * 10**6)) <= 200_001
    assert shorten_message([{"role": "user", "content": "x", "tool_calls": None}]) == [
        {"role": "user", "content": "x", "tool_calls": None}
    ]
