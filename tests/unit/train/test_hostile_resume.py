"""A run resumes in a folder with invalid files. The files are refused or skipped."""

from __future__ import annotations

import json
import os
import time

import pytest
from test_branch import tags, train, write

from toolkit.base.errors import ConfigError, InputError
from toolkit.train.checkpointing import branch, checkpoint, rollback
from toolkit.train.data import chat_record
from toolkit.train.report.reward_watch import RewardWatch


def replace_with_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


RECORDS = {
    "a pipe": replace_with_pipe,
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[1]"),
    "many parents": lambda path: path.write_text(
        json.dumps({"name": "x", "parents": [["y", 1]] * 10_000})
    ),
    "no steps": lambda path: path.write_text('{"name": "x", "parents": [["y", null]]}'),
    "infinite steps": lambda path: path.write_text('{"name": "x", "parents": [["y", 1e999]]}'),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_an_invalid_branch_record_is_ignored_or_refused(tmp_path, kind):
    train(tmp_path, None, 4, "a")
    RECORDS[kind](tmp_path / ".branch.json")
    start_s = time.monotonic()
    if kind == "many parents":  # a valid record of another run
        with pytest.raises(ConfigError, match="another branch"):
            branch.resume_point(tmp_path, "auto")
    else:
        assert branch.resume_point(tmp_path, "auto")[0] == tmp_path / "checkpoint-4"
    assert time.monotonic() - start_s < 10


def test_a_rollback_uses_the_next_free_abandoned_folder(tmp_path):
    train(tmp_path, None, 6, "a")
    for number in (7, 99_999_999, 100_000_000):
        (tmp_path / f"abandoned-{number}").mkdir()
    replace_with_pipe(tmp_path / "abandoned-99999999" / "abandoned.json")
    (tmp_path / ".abandoned-1.partial").symlink_to("/")
    start = rollback.begin_branch(tmp_path, tmp_path / "checkpoint-2")
    abandoned = tmp_path / "abandoned-100000001"
    assert f"moved to {abandoned}: checkpoint-4, checkpoint-6" in start.notes[0]
    assert tags(abandoned) == "aaaaaa"
    assert (tmp_path / ".abandoned-1.partial").is_symlink()


def test_a_rollback_does_not_follow_a_link_at_its_temporary_name(tmp_path):
    train(tmp_path, None, 4, "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / ".abandoned-1.partial").symlink_to(outside)
    start = rollback.begin_branch(tmp_path, tmp_path / "checkpoint-2")
    assert "abandoned-1: checkpoint-4" in start.notes[0]
    assert tags(tmp_path / "abandoned-1") == "aaaa"
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    "forged",
    [{"positions": {"metrics.jsonl": float("inf")}}, {"positions": {"metrics.jsonl": -1}},
     {"positions": {"metrics.jsonl": "9"}}, {"log_sha256": 5}, {"log_sha256": []}],
)  # fmt: skip
def test_impossible_log_positions_are_refused(tmp_path, forged):
    train(tmp_path, None, 2, "a")
    state = tmp_path / "checkpoint-2" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **forged}))
    with pytest.raises(InputError, match="positions or log_sha256 has an impossible value"):
        rollback.begin_branch(tmp_path, tmp_path / "checkpoint-2")


def test_many_invalid_checkpoints_are_skipped_quickly(tmp_path):
    train(tmp_path, None, 2, "a")
    for step in range(1000, 1500):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text("{}")
    start_s = time.process_time()
    chosen, skipped = branch.resume_point(tmp_path, "auto")
    assert chosen == tmp_path / "checkpoint-2"
    assert len(skipped) == 500
    assert time.process_time() - start_s < 5


def test_many_faults_are_reported_in_a_few_lines(tmp_path):
    folder = write(tmp_path, 2)
    checksums = {f"file-{number}": {"bytes": 1, "sha256": ""} for number in range(3000)}
    text = checkpoint._checksums_text(checksums)
    (folder / checkpoint.CHECKSUMS_FILE).write_text(text)
    start_s = time.process_time()
    faults = checkpoint.find_faults(folder)
    assert faults[-1] == "and 2980 more"
    assert len(faults) == 21
    assert time.process_time() - start_s < 10


@pytest.mark.parametrize("kind", ["pipe", "line", "nested", "binary"])
def test_an_unreadable_completion_log_gives_no_chat_format(tmp_path, kind):
    path = tmp_path / "completions.jsonl"
    if kind == "pipe":
        replace_with_pipe(path)
    elif kind == "line":
        with path.open("wb") as file:
            file.truncate(1 << 30)  # zero bytes without a line end
    else:
        path.write_bytes(b"[" * 10**6 if kind == "nested" else b"\xff" * 1000)
    assert chat_record.run_used_chats(tmp_path) is None


@pytest.mark.parametrize("count", ['"x"', "1e999", "-5", "[]", "9" * 30, "null", "NaN"])
def test_an_invalid_count_in_the_last_row_counts_as_zero(tmp_path, count):
    row = f'{{"loss": 0, "reward": 1, "steps_without_signal": {count}}}'
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    assert RewardWatch(tmp_path, print).count == 0
