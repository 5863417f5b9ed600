"""Pipes, devices, circles of links and oversized files: every command refuses them, at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from validate_world import PARTS, VALID_RUN_FILE, envcheck

TOOLKIT = Path(sys.executable).with_name("toolkit")
KINDS = {
    "pipe": "a pipe, not a regular file",
    "device": "a device, not a regular file",
    "loop": "the symbolic links of its path form a loop",
}


def make_special_file(path: Path, kind: str) -> Path:
    """Something at ``path`` that no reader would come to the end of."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    return path


def make_run_file(folder: Path) -> Path:
    """A run file over a model's folder and a data set of its own."""
    (folder / "model").mkdir()
    for file in (PARTS / "model").iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    (folder / "train.jsonl").write_bytes((PARTS / "train.jsonl").read_bytes())
    run_file = folder / "run.yaml"
    run_file.write_text(VALID_RUN_FILE.replace(f"{PARTS}/", ""))
    return run_file


def run_all_commands(run_file: Path) -> list[subprocess.CompletedProcess[str]]:
    """Each command that reads a run file, with the seconds bounded."""
    found = [
        envcheck("validate", run_file),
        envcheck("check", "--config", run_file),
        envcheck("size", run_file),
    ]
    begin = time.monotonic()
    done = subprocess.run(
        [TOOLKIT, "train", run_file], capture_output=True, text=True, check=False, timeout=60
    )
    assert time.monotonic() - begin < 30
    assert not (run_file.parent / "outputs").exists()
    return [*found, done]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_special_file_in_the_model_is_an_error(tmp_path: Path, kind: str, name: str) -> None:
    run_file = make_run_file(tmp_path)
    make_special_file(tmp_path / "model" / name, kind)
    for done in run_all_commands(run_file):
        told = done.stdout + done.stderr
        assert (done.returncode, "Traceback" in told) == (1, False), told
        assert f"{name} " in told
        assert KINDS[kind] in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_file_as_the_data_is_an_error(tmp_path: Path, kind: str) -> None:
    run_file = make_run_file(tmp_path)
    make_special_file(tmp_path / "train.jsonl", kind)
    done = envcheck("validate", run_file, "--format", "json")
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)["findings"]
    assert (found["rule"], found["line"], found["key"]) == ("DATA003", 2, "dataset.path")
    assert KINDS[kind] in found["message"]


@pytest.mark.parametrize("kind", [*KINDS, "huge"])
def test_special_files_as_the_weights_are_errors(tmp_path: Path, kind: str) -> None:
    run_file = make_run_file(tmp_path)
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    path = tmp_path / "model" / "model.safetensors"
    if kind == "huge":
        path.write_bytes((1 << 40).to_bytes(8, "little"))
        os.truncate(path, 1 << 41)
    else:
        make_special_file(path, kind)
    for done in (envcheck("validate", run_file), envcheck("size", run_file)):
        assert "Traceback" not in done.stdout + done.stderr
        assert done.returncode in (0, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_file_as_the_run_file_is_an_error(tmp_path: Path, kind: str) -> None:
    done = envcheck("validate", make_special_file(tmp_path / "run.yaml", kind))
    assert done.returncode == 2
    assert "DOC014" in done.stdout


def test_a_config_of_several_gigabytes_is_an_error(tmp_path: Path) -> None:
    run_file = make_run_file(tmp_path)
    os.truncate(tmp_path / "model" / "config.json", 4 << 30)
    for done in (envcheck("validate", run_file), envcheck("size", run_file)):
        assert done.returncode in (1, 2), done.stdout + done.stderr
        assert "config.json" in done.stdout + done.stderr


def test_a_special_file_as_recording_or_lock_is_an_error(tmp_path: Path) -> None:
    pipe = make_special_file(tmp_path / "pipe", "pipe")
    for arguments in (("replay", pipe), ("check", "--lock", pipe)):
        done = envcheck(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert KINDS["pipe"] in done.stderr


@pytest.mark.parametrize("words", [("envcheck", "validate", "x.yaml"), ("toolkit", "import", "x")])
def test_a_removed_working_folder_is_an_error(tmp_path: Path, words: tuple[str, ...]) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the folder in which the command was started was removed")
