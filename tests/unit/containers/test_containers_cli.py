"""The command line of the container scripts: the arguments that a script gets, and usage errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "containers"


@pytest.fixture(scope="module")
def cli() -> Any:
    spec = importlib.util.spec_from_file_location("containers_cli", FOLDER / "cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "script", "arguments"),
    [
        ("build train", "build.sh", ["train", "0", "", "localhost/toolkit:train"]),
        (
            "build envcheck --stand-in --engine buildah --tag x:y",
            "build.sh",
            ["envcheck", "1", "buildah", "x:y"],
        ),
        ("sif", "sif.sh", ["train-cpu", "image", "0", ""]),
        (
            "sif envcheck --from-base --stand-in --output /a/b.sif",
            "sif.sh",
            ["envcheck", "base", "1", "/a/b.sif"],
        ),
        ("lock", "lock.sh", ["lock"]),
        ("lock --check", "lock.sh", ["check"]),
        ("lock --upgrade", "lock.sh", ["upgrade"]),
        ("test", "test.sh", ["image"]),
        ("test --quick -x -k sif", "test.sh", ["image and not slow", "-x", "-k", "sif"]),
        ("sbom out train", "sbom.sh", ["out", "train"]),
        ("sbom out", "sbom.sh", ["out", "envcheck", "train-cpu", "train"]),
        ("audit", "audit.sh", ["light", "cpu", "cu130", "build"]),
        ("audit light", "audit.sh", ["light"]),
    ],
)
def test_a_script_gets_plain_arguments(
    cli: Any, words: str, script: str, arguments: list[str]
) -> None:
    assert cli.script_command(words.split()) == [str(FOLDER / script), *arguments]


def test_a_relative_output_is_made_absolute(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.script_command(["sif", "--output", "a.sif"])[-1] == str(tmp_path / "a.sif")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "build",
        "build training",
        "build train --engine podman",
        "build train --unknown",
        "sif --from-image --from-base",
        "lock --check --upgrade",
        "sbom out training",
        "audit light --unknown",
    ],
)
def test_a_wrong_command_line_is_a_usage_error(cli: Any, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.script_command(words.split())
    assert stopped.value.code == 2
