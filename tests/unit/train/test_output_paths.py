"""If a file in the run folder would prevent a run from writing its results, the check before
training raises an error.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from toolkit.base.errors import ConfigError
from toolkit.base.paths import append_line
from toolkit.config.run_config import DatasetSection, LoraSection, ModelSection, RunConfig
from toolkit.train.checkpointing import output_paths, run_directory

OBSTACLES = {
    "link": lambda path, outside: path.symlink_to(outside),
    "broken link": lambda path, _: path.symlink_to("nowhere"),
    "pipe": lambda path, _: os.mkfifo(path),
    "file": lambda path, _: path.write_text("mine"),
    "folder": lambda path, _: path.mkdir(),
}
LOGS = ("metrics.jsonl", "bad_rewards.jsonl")
CASES = [
    *((name, kind) for name in ("adapter", "model") for kind in OBSTACLES if kind != "folder"),
    *((name, kind) for name in LOGS for kind in OBSTACLES if kind != "file"),
    *((name, "folder") for name in ("report.html", "trackers.json", "adapter/base.json")),
    *((name, "pipe") for name in ("trackers.json", "config.json", "adapter/base.json")),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_obstacle_in_the_run_folder_is_an_error_with_its_path(tmp_path, name, kind):
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (run_dir / name).parent.mkdir(parents=True)
    OBSTACLES[kind](run_dir / name, outside)
    with pytest.raises(ConfigError, match="but the run writes a") as refused:
        output_paths.check_output_paths(run_dir)
    assert refused.value.where == str(run_dir / name)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("tracker", output_paths.TRACKER_FOLDERS)
def test_a_link_as_the_folder_of_a_tracker_is_an_error(tmp_path, tracker):
    outside = tmp_path / "outside"
    outside.mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / output_paths.TRACKER_FOLDERS[tracker]).symlink_to(outside)
    plain = RunConfig(model=ModelSection(model_name="m"))
    output_paths.check_output_paths(run_dir, plain)  # the run does not use the tracker
    with pytest.raises(ConfigError, match="is a link, but the run writes a folder"):
        output_paths.check_output_paths(run_dir, replace(plain, grpo={"report_to": [tracker]}))


@pytest.mark.parametrize(
    ("key", "name"),
    [("model", "."), ("model", "model"), ("adapter", "adapter"), ("data", "completions.jsonl"),
     ("data", "."), ("source", "config.json")],
)  # fmt: skip
def test_the_inputs_of_a_run_are_not_overwritten(tmp_path, key, name):
    """For example, --output-dir MODEL would replace the config.json of the model."""
    run_dir = tmp_path / "run"
    path = run_dir / name
    if "." in name and name != ".":
        run_dir.mkdir()
        path.write_text("{}")
    else:
        path.mkdir(parents=True)
    config = RunConfig(
        model=ModelSection(model_name=str(path) if key == "model" else "m"),
        lora=LoraSection(adapter_path=str(path) if key == "adapter" else None),
        dataset=DatasetSection(path=str(path) if key == "data" else None),
        source=str(path) if key == "source" else "",
    )
    with pytest.raises(ConfigError, match="but would overwrite it or files in it"):
        output_paths.check_output_paths(run_dir, config)
    output_paths.check_output_paths(tmp_path / "other", config)


def test_a_run_can_resume_from_its_own_config(tmp_path):
    for name in (".branch.json", "config.json"):
        (tmp_path / name).write_text("{}")
    source = str(tmp_path / "config.json")
    output_paths.check_output_paths(
        tmp_path, RunConfig(model=ModelSection(model_name="m"), source=source)
    )


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "[]", "{", ""])
def test_a_config_that_no_run_wrote_is_not_replaced(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no run wrote this file") as refused:
        output_paths.check_output_paths(tmp_path, RunConfig(model=ModelSection(model_name="m")))
    assert refused.value.where == str(path)
    assert path.read_text() == text


def test_the_config_of_a_run_that_ended_before_its_first_step_is_replaced(tmp_path):
    config = RunConfig(model=ModelSection(model_name="m"))
    run_directory.write_config(tmp_path, config)
    output_paths.check_output_paths(tmp_path, config)


def test_files_of_an_earlier_run_are_accepted(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter/base.json", "metrics.jsonl", "bad_rewards.jsonl", "report.html"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "config.json").symlink_to("report.html")
    output_paths.check_output_paths(tmp_path)


def test_lines_are_only_appended_to_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=r"pipe|link"):
            append_line(tmp_path / name, "x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a regular file"):
        append_line(tmp_path / "pipe", "x")
    os.close(reader)
    assert not (tmp_path / "outside").exists()


def test_a_lock_file_that_is_a_link_is_an_error(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "outside")
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        run_directory.lock_run_dir(tmp_path),
    ):
        pass
    assert not (tmp_path / "outside").exists()


def test_a_folder_name_with_a_nul_is_an_error(tmp_path):
    with (
        pytest.raises(ConfigError, match="cannot be written: embedded null byte"),
        run_directory.lock_run_dir(tmp_path / "a\0b"),
    ):
        pass
