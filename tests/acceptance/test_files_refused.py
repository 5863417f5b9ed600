"""Every command refuses pipes, devices, loops of symbolic links and oversized files immediately."""

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
    """Make a file at ``path`` that cannot be read to its end."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    return path


def make_run_file(folder: Path) -> Path:
    """Make a run file with its own model folder and dataset."""
    (folder / "model").mkdir()
    for file in (PARTS / "model").iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    (folder / "train.jsonl").write_bytes((PARTS / "train.jsonl").read_bytes())
    run_file = folder / "run.yaml"
    run_file.write_text(VALID_RUN_FILE.replace(f"{PARTS}/", ""))
    return run_file


def run_all_commands(run_file: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run each command that reads a run file. ``toolkit train`` must end within 30 seconds."""
    results = [
        envcheck("validate", run_file),
        envcheck("check", "--config", run_file),
        envcheck("size", run_file),
    ]
    begin = time.monotonic()
    result = subprocess.run(
        [TOOLKIT, "train", run_file], capture_output=True, text=True, check=False, timeout=60
    )
    assert time.monotonic() - begin < 30
    assert not (run_file.parent / "outputs").exists()
    return [*results, result]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_special_file_in_the_model_is_an_error(tmp_path: Path, kind: str, name: str) -> None:
    run_file = make_run_file(tmp_path)
    make_special_file(tmp_path / "model" / name, kind)
    for done in run_all_commands(run_file):
        output = done.stdout + done.stderr
        assert (done.returncode, "Traceback" in output) == (1, False), output
        assert f"{name} " in output
        assert KINDS[kind] in output


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_file_as_the_data_is_an_error(tmp_path: Path, kind: str) -> None:
    run_file = make_run_file(tmp_path)
    make_special_file(tmp_path / "train.jsonl", kind)
    result = envcheck("validate", run_file, "--format", "json")
    assert result.returncode == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["rule"], finding["line"], finding["key"]) == ("DATA003", 2, "dataset.path")
    assert KINDS[kind] in finding["message"]


@pytest.mark.parametrize("kind", [*KINDS, "huge"])
def test_special_files_as_the_weights_cause_no_traceback(tmp_path: Path, kind: str) -> None:
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
    result = envcheck("validate", make_special_file(tmp_path / "run.yaml", kind))
    assert result.returncode == 2
    assert "DOC014" in result.stdout


def test_a_config_of_several_gigabytes_is_an_error(tmp_path: Path) -> None:
    run_file = make_run_file(tmp_path)
    os.truncate(tmp_path / "model" / "config.json", 4 << 30)
    for done in (envcheck("validate", run_file), envcheck("size", run_file)):
        assert done.returncode in (1, 2), done.stdout + done.stderr
        assert "config.json" in done.stdout + done.stderr


def test_a_special_file_as_recording_or_lock_is_an_error(tmp_path: Path) -> None:
    pipe = make_special_file(tmp_path / "pipe", "pipe")
    for arguments in (("replay", pipe), ("check", "--lock", pipe)):
        result = envcheck(*arguments)
        assert result.returncode == 2, result.stdout + result.stderr
        assert KINDS["pipe"] in result.stderr


@pytest.mark.parametrize("words", [("envcheck", "validate", "x.yaml"), ("toolkit", "import", "x")])
def test_a_removed_working_folder_is_an_error(tmp_path: Path, words: tuple[str, ...]) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    result = subprocess.run(
        ["sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(
        "error: the folder in which the command was started was removed"
    )
