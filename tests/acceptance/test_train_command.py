"""``toolkit train`` as it is typed: what it leaves, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import train_world as world

from toolkit.config.validate import check_instance


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_file = world.make(tmp_path_factory.mktemp("w"))
    return run_file, world.toolkit("train", run_file, "--evaluate")


def test_it_trains_and_leaves_the_run_folder(trained):
    run_file, done = trained
    run_dir = run_file.parent / "run"
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in run_dir.iterdir() if path.name != ".lock"} == {
        "adapter",
        "checkpoint-6",
        "checkpoint-8",
        "completions.jsonl",
        "config.json",
        "evaluation.json",
        "manifest.json",
        "metrics.jsonl",
        "preflight.json",
        "report.html",
        "timings.jsonl",
    }
    rows = world.rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"reward", "reward_std", "loss", "entropy", "completion_length", "grad_norm"} <= set(
        rows[0]
    )
    assert {"rewards/ones/mean", "rewards/exact_match/mean"} <= set(rows[0])
    timings = world.rows(run_dir, "timings.jsonl")
    assert all(row["step_s"] > 0 and row["peak_memory_bytes"] > 0 for row in timings)
    completions = world.rows(run_dir, "completions.jsonl")
    assert len(completions) == 8 * 8
    assert set(completions[0]["rewards"]) == {"ones", "exact_match"}


def test_what_it_prints_is_lines(trained):
    _, done = trained
    lines = done.stdout.splitlines()
    assert "\r" not in done.stdout
    assert sum(line.startswith("step ") for line in lines) == 8
    assert any(line.startswith("held out exact_match ") for line in lines)
    assert lines[-1].startswith("report ")


def test_the_manifest_is_by_its_schema_and_holds_no_secret(trained):
    run_file, _ = trained
    manifest = json.loads((run_file.parent / "run" / "manifest.json").read_text())
    assert check_instance(manifest, "manifest") == []
    assert manifest["packages"]["trl"] == "1.16.0"
    assert manifest["seeds"] == {"grpo.seed": 3, "lora.random_state": 5}
    assert set(manifest["data_sha256"]) == {"train", "eval"}


def test_started_again_it_finds_itself_finished(trained):
    run_file, _ = trained
    before = world.digests(run_file.parent / "run")
    done = world.toolkit("train", run_file)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-8" in done.stdout
    assert world.digests(run_file.parent / "run") == before


def test_a_run_file_that_changed_is_refused_by_name(trained):
    run_file, _ = trained
    done = world.toolkit("train", run_file, "--set", "grpo.learning_rate=0.02")
    assert done.returncode == 1
    assert "grpo.learning_rate (0.01 -> 0.02)" in done.stderr
    assert "runtime.allow_changed: [grpo.learning_rate]" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_that_changed_is_refused(trained, tmp_path):
    run_file, _ = trained
    folder = tmp_path / "copy"
    shutil.copytree(run_file.parent, folder)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"question": "1+1=", "answer": "2"}\n')
    model = f'model.model_name="{run_file.parent / "model"}"'
    done = world.toolkit("train", folder / "run.yaml", "--set", model)
    assert done.returncode == 1
    assert "data.train" in done.stderr


def test_dry_run_shows_the_resolved_run_and_writes_nothing(tmp_path):
    run_file = world.make(tmp_path)
    done = world.toolkit("train", run_file, "--dry-run", "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["grpo"]["max_steps"] == 3
    assert shown["model"]["max_num_seqs"] != "auto"
    assert not (tmp_path / "run").exists()


def spoil_data(folder):
    (folder / "train.jsonl").write_text("")


def spoil_column(folder):
    text = (folder / "run.yaml").read_text().replace("prompt: question", "prompt: questoin")
    (folder / "run.yaml").write_text(text)


def spoil_model(folder):
    (folder / "model" / "config.json").unlink()


def spoil_reward(folder):
    (folder / "my_rewards.py").write_text("def ones(completions, **_):\n    raise KeyError('x')\n")


def spoil_length(folder):
    (folder / "my_rewards.py").write_text("def ones(completions, **_):\n    return [1.0]\n")


def spoil_output(folder):
    (folder / "run").write_text("a file\n")


@pytest.mark.parametrize(
    ("spoil", "codes", "words"),
    [
        (spoil_data, {1, 2}, ["train.jsonl"]),
        (spoil_column, {1}, ["questoin"]),
        (spoil_model, {1, 2}, ["model"]),
        (spoil_reward, {1}, ["ones", "KeyError"]),
        (spoil_length, {1}, ["ones", "1", "8"]),
        (spoil_output, {1, 2}, ["run"]),
    ],
)
def test_bad_input_is_one_error_that_says_what_to_do(tmp_path, spoil, codes, words):
    run_file = world.make(tmp_path)
    spoil(tmp_path)
    done = world.toolkit("train", run_file)
    assert done.returncode in codes, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_missing_run_file():
    done = world.toolkit("train", "nowhere.yaml")
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_output_folder(tmp_path):
    run_file = world.make(tmp_path)
    (tmp_path / "closed").mkdir(mode=0o555)
    done = world.toolkit("train", run_file, "--output-dir", tmp_path / "closed" / "run")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    import fcntl

    run_file = world.make(tmp_path)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = world.toolkit("train", run_file)
    assert done.returncode == 4
    assert "another run is writing to this folder" in done.stderr
