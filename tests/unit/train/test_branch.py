"""Which checkpoints belong to a run, and what a run moves when it resumes from an earlier
checkpoint.
"""

from __future__ import annotations

import json
import shutil

import pytest

from toolkit.base.errors import ConfigError
from toolkit.train.checkpointing import branch, checkpoint, rollback
from toolkit.train.checkpointing.branch import Branch
from toolkit.train.report.metrics_log import LOG_FILES, Journal


def write(run_dir, step, step_branch=None, journal=None, **state):
    """Write a checkpoint of ``step``. Without ``step_branch``, it has no branch, like a checkpoint
    of an earlier release.
    """
    partial = checkpoint.begin(run_dir, step)
    positions = journal.positions() if journal is not None else {}
    described = {"positions": positions, **state}
    if step_branch is not None:
        described["branch"] = step_branch.to_json()
    if journal is not None and step_branch is not None:
        described["log_sha256"] = journal.digests()
    (partial / "state.json").write_text(json.dumps(described))
    (partial / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint.commit(partial, step)


def train(run_dir, resume_from, last, tag, every=2):
    """Log a row with ``tag`` per step up to the step ``last``. Write a checkpoint every ``every``
    steps.
    """
    start = rollback.begin_branch(run_dir, resume_from)
    journal = Journal(run_dir, start.log_positions)
    done = 0 if resume_from is None else branch.read_branch(resume_from)[1]
    for step in range(done + 1, last + 1):
        for name in LOG_FILES:
            journal.write(name, {"step": step, "tag": tag})
        if step % every == 0:
            write(run_dir, step, start.branch, journal)
    journal.close()
    return start


def tags(folder, name="metrics.jsonl"):
    return "".join(
        json.loads(step_branch)["tag"] for step_branch in (folder / name).read_text().splitlines()
    )


def visible_names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_resuming_from_an_earlier_step_moves_the_later_checkpoints(tmp_path):
    train(tmp_path, None, 8, "a")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "report.html").write_text("of a")
    start = train(tmp_path, tmp_path / "checkpoint-4", 6, "b")
    abandoned = tmp_path / "abandoned-1"
    assert start.notes == (
        f"the checkpoints later than {tmp_path}/checkpoint-4 were moved to {abandoned}:"
        " checkpoint-6, checkpoint-8",
    )
    expected = [
        "abandoned.json",
        "adapter",
        "checkpoint-6",
        "checkpoint-8",
        *LOG_FILES,
        "report.html",
    ]
    assert visible_names(abandoned) == sorted(expected)
    assert visible_names(tmp_path) == sorted(
        ["abandoned-1", "checkpoint-2", "checkpoint-4", "checkpoint-6", *LOG_FILES]
    )
    for name in LOG_FILES:
        assert (tags(tmp_path, name), tags(abandoned, name)) == ("aaaabb", "aaaaaaaa")
    # The last step of the abandoned branch is not the last step of this branch.
    assert branch.resume_point(tmp_path, "auto") == (tmp_path / "checkpoint-6", [])
    train(tmp_path, tmp_path / "checkpoint-6", 8, "b")
    assert tags(tmp_path) == "aaaabbbb"
    assert visible_names(tmp_path).count("abandoned-2") == 0


def test_rotation_counts_only_checkpoints_of_the_branch(tmp_path):
    train(tmp_path, None, 8, "a")
    train(tmp_path, tmp_path / "checkpoint-4", 8, "b")
    shutil.copytree(tmp_path / "abandoned-1" / "checkpoint-8", tmp_path / "checkpoint-80")
    shutil.copytree(tmp_path / "abandoned-1" / "checkpoint-6", tmp_path / "checkpoint-10")
    branch.rotate_checkpoints(tmp_path, [4], keep_last=1)
    found = [name for name in visible_names(tmp_path) if name.startswith("checkpoint-")]
    assert found == ["checkpoint-10", "checkpoint-4", "checkpoint-8", "checkpoint-80"]
    chosen, skipped = branch.resume_point(tmp_path, "auto")
    assert chosen == tmp_path / "checkpoint-8"
    assert [step_branch.partition(": ")[2].partition(",")[0] for step_branch in skipped] == [
        "contains step 8",
        "contains step 6",
    ]


def test_a_run_can_resume_from_an_abandoned_branch(tmp_path):
    train(tmp_path, None, 8, "a")
    train(tmp_path, tmp_path / "checkpoint-4", 8, "b")
    train(tmp_path, tmp_path / "abandoned-1" / "checkpoint-6", 8, "c")
    assert tags(tmp_path) == "aaaaaacc"
    assert tags(tmp_path / "abandoned-2") == "aaaabbbb"
    assert branch.valid_steps(tmp_path) == [8, 4, 2]
    assert checkpoint.find_faults(tmp_path / "abandoned-1" / "checkpoint-6") == []


def test_resuming_from_another_run_folder_copies_its_logs(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, tag in ((one, "a"), (two, "z")):
        folder.mkdir()
        train(folder, None, 4, tag)
    train(two, one / "checkpoint-2", 4, "b")
    assert tags(two) == "aabb"
    assert tags(two / "abandoned-1") == "zzzz"
    assert branch.valid_steps(two) == [4]
    assert visible_names(one) == sorted(["checkpoint-2", "checkpoint-4", *LOG_FILES])
    assert tags(one) == "aaaa"


@pytest.mark.parametrize("killed_after", ["copied", "recorded", "one moved"])
def test_the_next_start_finishes_a_killed_rollback(tmp_path, monkeypatch, killed_after):
    train(tmp_path, None, 8, "a")
    (tmp_path / "adapter").mkdir()

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    if killed_after == "copied":
        monkeypatch.setattr(branch, "record_branch", die)
    elif killed_after == "recorded":
        monkeypatch.setattr(checkpoint, "move_into", die)
    else:
        move_into = checkpoint.move_into
        monkeypatch.setattr(
            checkpoint, "move_into", lambda p, f: die() if p.name.endswith("6") else move_into(p, f)
        )
    with pytest.raises(Killed):
        rollback.begin_branch(tmp_path, tmp_path / "checkpoint-4")
    monkeypatch.undo()
    chosen, _ = branch.resume_point(tmp_path, "auto")
    if killed_after == "copied":
        # The new branch was not recorded, so the old one continues.
        assert chosen == tmp_path / "checkpoint-8"
        chosen = tmp_path / "checkpoint-4"
    assert chosen == tmp_path / "checkpoint-4"
    train(tmp_path, chosen, 8, "b")
    assert tags(tmp_path) == "aaaabbbb"
    assert branch.valid_steps(tmp_path) == [8, 6, 4, 2]
    abandoned_folders = sorted(tmp_path.glob("abandoned-*"))
    assert len(abandoned_folders) == (1 if killed_after == "copied" else 2)
    moved = sorted(
        path.name for folder in abandoned_folders for path in folder.glob("checkpoint-*")
    )
    assert moved == ["checkpoint-6", "checkpoint-8"]
    assert all(tags(folder) == "aaaaaaaa" for folder in abandoned_folders)


def add_foreign_folders(run_dir):
    """Create files and folders that have names of checkpoints, but that the run did not write."""
    (run_dir / "checkpoint-99").mkdir()
    (run_dir / "checkpoint-98").mkdir()
    (run_dir / "checkpoint-98" / "notes.txt").write_text("mine")
    (run_dir / "checkpoint-97").symlink_to(run_dir / "checkpoint-2")
    (run_dir / "checkpoint-96").write_text("a file")
    for name in ("checkpoint-99999999999999999999", "checkpoint--1", "checkpoint-007"):
        shutil.copytree(run_dir / "checkpoint-2", run_dir / name)
    (run_dir / "checkpoint-٣").mkdir()
    shutil.copytree(run_dir / "checkpoint-2", run_dir / "checkpoint-95")
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-94")
    (run_dir / "checkpoint-94" / "state.json").write_text("{")


def test_folders_that_the_run_did_not_write_are_ignored(tmp_path):
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    for folder in (plain, mixed):
        folder.mkdir()
        train(folder, None, 8, "a")
    add_foreign_folders(mixed)
    foreign_names = set(visible_names(mixed)) - set(visible_names(plain))
    assert len(foreign_names) == 10
    chosen, skipped = branch.resume_point(mixed, "auto")
    assert chosen == mixed / "checkpoint-8"
    # Only the two folders that contain files of a checkpoint are reported.
    assert [step_branch.partition(":")[0] for step_branch in skipped] == [
        f"{mixed}/checkpoint-95",
        f"{mixed}/checkpoint-94",
    ]
    assert branch.valid_steps(mixed) == branch.valid_steps(plain) == [8, 6, 4, 2]
    for folder in (plain, mixed):
        branch.rotate_checkpoints(folder, [], keep_last=2)
    assert set(visible_names(mixed)) - set(visible_names(plain)) == foreign_names
    assert branch.valid_steps(mixed) == [8, 6]
    assert rollback.begin_branch(mixed, mixed / "checkpoint-6").notes
    assert visible_names(mixed / "abandoned-1") == sorted(
        ["abandoned.json", "checkpoint-8", *LOG_FILES]
    )


def test_a_run_begins_if_the_folder_has_only_foreign_folders(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    assert branch.resume_point(tmp_path, "auto") == (None, [])
    assert branch.resume_point(tmp_path, "never") == (None, [])


def test_a_folder_with_only_checkpoints_of_another_run_is_refused(tmp_path):
    step_branch = Branch()
    branch.record_branch(tmp_path, step_branch)
    write(tmp_path, 4, Branch())
    with pytest.raises(
        ConfigError, match="no checkpoint in this folder is intact and belongs to this run"
    ) as caught:
        branch.resume_point(tmp_path, "auto")
    assert "checkpoint-4: belongs to another branch or another run" in caught.value.message


def test_a_run_resumes_from_checkpoints_of_earlier_releases(tmp_path):
    journal = Journal(tmp_path)
    for step in range(1, 9):
        journal.write("metrics.jsonl", {"step": step, "tag": "o"})
        if step % 2 == 0:
            write(tmp_path, step, None, journal)
    journal.close()
    assert branch.resume_point(tmp_path, "auto") == (tmp_path / "checkpoint-8", [])
    train(tmp_path, tmp_path / "checkpoint-8", 10, "a")
    assert tags(tmp_path) == "oooooooo" + "aa"
    train(tmp_path, tmp_path / "checkpoint-4", 6, "b")
    assert tags(tmp_path) == "oooobb"
    assert branch.resume_point(tmp_path, "auto")[0] == tmp_path / "checkpoint-6"
    moved = ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    assert [
        n for n in visible_names(tmp_path / "abandoned-1") if n.startswith("checkpoint")
    ] == moved


def test_a_log_that_was_changed_is_moved_and_a_new_one_begins(tmp_path):
    train(tmp_path, None, 4, "a")
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace("a", "x", 5))
    (tmp_path / "timings.jsonl").unlink()
    start = train(tmp_path, tmp_path / "checkpoint-4", 6, "a")
    assert [note.partition(",")[0].split(" that ")[0] for note in start.notes] == [
        "metrics.jsonl is not the file",
        "timings.jsonl is not the file",
    ]
    assert (tags(tmp_path), tags(tmp_path, "completions.jsonl")) == ("aa", "aaaaaa")
    assert (tmp_path / "abandoned-1" / "metrics.jsonl").read_text().count("x") > 0


def test_without_checkpoints_the_run_begins_again_with_a_note(tmp_path):
    assert train(tmp_path, None, 4, "a").notes == ()
    (tmp_path / "bad_rewards.jsonl").write_text("of a\n")
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert branch.resume_point(tmp_path, "auto") == (None, [])
    start = train(tmp_path, None, 2, "b")
    abandoned = tmp_path / "abandoned-1"
    assert start.notes == (
        f"no checkpoint in {tmp_path}, which has 4 rows of metrics of an earlier start: training"
        f" begins again at step 0, and the earlier files are moved to {abandoned}",
    )
    assert (tags(tmp_path), tags(abandoned)) == ("bb", "aaaa")
    assert (abandoned / "bad_rewards.jsonl").read_text() == "of a\n"
    assert not (tmp_path / "bad_rewards.jsonl").exists()


def test_samples_of_bad_rewards_stay_with_their_branch(tmp_path):
    train(tmp_path, None, 4, "a")
    (tmp_path / "bad_rewards.jsonl").write_text("of a\nof b\n")
    rollback.begin_branch(tmp_path, tmp_path / "checkpoint-2", bad_rewards_bytes=5)
    assert (tmp_path / "abandoned-1" / "bad_rewards.jsonl").read_text() == "of a\n"
    assert (tmp_path / "bad_rewards.jsonl").read_text() == "of b\n"
    # If all rows of the file are from this process, the file is not moved to another branch.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "bad_rewards.jsonl").write_text("of b\n")
    assert rollback.begin_branch(tmp_path / "new", None, bad_rewards_bytes=0).notes == ()
    assert (tmp_path / "new" / "bad_rewards.jsonl").read_text() == "of b\n"
