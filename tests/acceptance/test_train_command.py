"""``toolkit train``: the files of a run, the output, and the result of a second start."""

from __future__ import annotations

import json
import shutil

import pytest
import train_world as world
from spoiled_world import run_commands

from toolkit.config.explain import explain
from toolkit.config.validate import check_instance


def train_again(folder, *arguments):
    """Run the command in ``folder``, in a fork of a process that has imported everything."""
    return run_commands(
        [{"folder": folder, "arguments": ["train", "run.yaml", *map(str, arguments)]}]
    )[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_file = world.make_run_files(tmp_path_factory.mktemp("w"))
    # resume: never needs an empty folder. The .lock file of the run itself does not count.
    arguments = ("train", run_file, "--evaluate", "--set", "runtime.resume=never")
    return run_file, world.run_toolkit(*arguments)


def test_a_run_trains_and_writes_its_run_folder(trained):
    run_file, result = trained
    run_dir = run_file.parent / "run"
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert {path.name for path in run_dir.iterdir() if path.name != ".lock"} == {
        ".branch.json",
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
    rows = world.read_rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"reward", "reward_std", "loss", "entropy", "completion_length", "grad_norm"} <= set(
        rows[0]
    )
    assert {"rewards/ones/mean", "rewards/exact_match/mean"} <= set(rows[0])
    timings = world.read_rows(run_dir, "timings.jsonl")
    assert all(row["step_s"] > 0 and row["peak_memory_bytes"] > 0 for row in timings)
    completions = world.read_rows(run_dir, "completions.jsonl")
    assert len(completions) == 8 * 8
    assert set(completions[0]["rewards"]) == {"ones", "exact_match"}


def test_every_metric_in_the_logs_is_documented(trained):
    run_dir = trained[0].parent / "run"
    logs = ("metrics.jsonl", "timings.jsonl")
    names = {name for log in logs for row in world.read_rows(run_dir, log) for name in row}
    assert [name for name in sorted(names) if explain(name) is None] == []


def test_the_output_consists_of_lines(trained):
    _, result = trained
    lines = result.stdout.splitlines()
    assert "\r" not in result.stdout
    assert sum(line.startswith("step ") for line in lines) == 8
    assert any(line.startswith("held out exact_match ") for line in lines)
    assert lines[-1].startswith("report ")


def test_the_manifest_matches_its_schema_and_has_no_secret(trained):
    run_file, _ = trained
    manifest = json.loads((run_file.parent / "run" / "manifest.json").read_text())
    assert check_instance(manifest, "manifest") == []
    assert manifest["packages"]["trl"] == "1.16.0"
    assert manifest["seeds"] == {"grpo.seed": 3, "lora.random_state": 5}
    assert set(manifest["data_sha256"]) == {"train", "eval"}


def test_a_finished_run_that_is_started_again_trains_nothing(trained):
    run_file, _ = trained
    before = world.result_digests(run_file.parent / "run")
    result = train_again(run_file.parent)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-8" in result.stdout
    assert world.result_digests(run_file.parent / "run") == before


def test_resume_never_rejects_a_folder_with_a_run(trained):
    run_file, _ = trained
    before = world.result_digests(run_file.parent / "run")
    result = train_again(run_file.parent, "--set", "runtime.resume=never")
    assert result.returncode == 1
    assert "RUN001" in result.stderr
    assert "is not empty, but a run with resume: never needs an empty folder" in result.stderr
    assert world.result_digests(run_file.parent / "run") == before


def test_a_changed_run_file_is_an_error_with_the_key(trained):
    run_file, _ = trained
    result = train_again(run_file.parent, "--set", "grpo.learning_rate=0.02")
    assert result.returncode == 1
    assert "grpo.learning_rate (0.01 -> 0.02)" in result.stderr
    assert "set runtime.allow_changed to [grpo.learning_rate]" in result.stderr
    assert "Traceback" not in result.stderr


def test_changed_data_is_an_error(trained, tmp_path):
    run_file, _ = trained
    folder = tmp_path / "copy"
    shutil.copytree(run_file.parent, folder)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"question": "1+1=", "answer": "2"}\n')
    model = f'model.model_name="{run_file.parent / "model"}"'
    result = train_again(folder, "--set", model)
    assert result.returncode == 1
    assert "data.train" in result.stderr


def test_full_fine_tuning_writes_a_model(tmp_path):
    from transformers import AutoModelForCausalLM

    run_file = world.make_run_files(tmp_path, steps=1)
    run_file.write_text(run_file.read_text().replace("dtype:", "full_finetuning: true, dtype:"))
    result = train_again(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "adapter  none: every weight is trained" in result.stdout
    assert f"model    {tmp_path / 'run' / 'model'}" in result.stdout
    base, trained = (
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        for folder in (tmp_path / "model", tmp_path / "run" / "model")
    )
    assert base.shape == trained.shape
    assert not base.equal(trained)


def test_dry_run_shows_the_resolved_run_and_writes_nothing(tmp_path):
    run_file = world.make_run_files(tmp_path)
    result = world.run_toolkit("train", run_file, "--dry-run", "--max-steps", "3")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["grpo"]["max_steps"] == 3
    assert shown["model"]["max_num_seqs"] != "auto"
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    import fcntl

    world.make_run_files(tmp_path)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = train_again(tmp_path)
    assert result.returncode == 4
    assert "another run is writing to this folder" in result.stderr
