"""The output formats of ``envcheck validate``, ``--fix``, and input that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from validate_world import ENVCHECK, FIXTURES, VALID_RUN_FILE, envcheck

from toolkit.config.validate import check_instance

if TYPE_CHECKING:
    from pathlib import Path


def test_json_matches_its_schema(tmp_path: Path) -> None:
    result = envcheck("validate", FIXTURES / "invalid", "--format", "json", "--set", "lora.r=x")
    assert check_instance(json.loads(result.stdout), "findings") == []
    assert len(json.loads(result.stdout)["findings"]) > 100


def test_sarif_has_rules_positions_and_replacements(tmp_path: Path) -> None:
    run = tmp_path / "run file.yaml"
    run.write_text(VALID_RUN_FILE + "lora:\n  r: 8.0\n", "utf-8")
    log = json.loads(envcheck("validate", run.name, "--format", "sarif", cwd=tmp_path).stdout)
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    (found,) = log["runs"][0]["results"]
    assert [rule["id"] for rule in log["runs"][0]["tool"]["driver"]["rules"]] == ["KEY003"]
    place = found["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "run%20file.yaml"
    assert place["region"] == {"startLine": 5, "startColumn": 6, "endColumn": 9}
    (change,) = found["fixes"][0]["artifactChanges"]
    region = change["replacements"][0]["deletedRegion"]
    text = run.read_text("utf-8")
    start = region["charOffset"]
    assert text[start : start + region["charLength"]] == "8.0"
    assert change["replacements"][0]["insertedContent"]["text"] == "8"


def test_github_annotations_are_one_line_each(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(VALID_RUN_FILE + "lora:\n  r: 65\n  bias: '100%,\n\n    a'\n", "utf-8")
    result = envcheck(
        "validate", "run.yaml", "--format", "github", "--set", "model.max_lora_rank=64",
        cwd=tmp_path,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "::error file=run.yaml,line=5,col=6,title=LORA003::lora.r: 65 is more"
    )
    assert "%0A" in lines[0]
    assert all(line.startswith("::error file=") for line in lines)
    assert len(lines) == 2


def test_fix_rewrites_scalars_only(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_bytes(
        (
            "\ufeff# the run\r\n"
            + VALID_RUN_FILE.replace("\n", "\r\n")
            + "lora:   # the adapter\r\n"
            "    r:    8.0      # a rank\r\n    lora_alfa: 16 # scale\r\n"
            "grpo: {learning_rate: 5e-6,   loss_type: 'DAPO'}  # small\r\n"
        ).encode()
    )
    run.chmod(0o640)
    result = envcheck("validate", run, "--fix")
    assert (result.returncode, result.stdout) == (0, f"no findings in {run}\n")
    assert "4 edits made" in result.stderr
    assert run.read_bytes().decode() == (
        "\ufeff# the run\r\n" + VALID_RUN_FILE.replace("\n", "\r\n") + "lora:   # the adapter\r\n"
        "    r:    8      # a rank\r\n    lora_alpha: 16 # scale\r\n"
        "grpo: {learning_rate: 5.0e-6,   loss_type: dapo}  # small\r\n"
    )
    assert run.stat().st_mode & 0o777 == 0o640
    assert envcheck("validate", "-", "--fix", stdin=VALID_RUN_FILE).returncode == 2


@pytest.mark.parametrize("form", ["text", "json", "sarif", "github"])
def test_a_secret_is_never_shown(tmp_path: Path, form: str) -> None:
    canary = "hf_canarycanarycanarycanarycanary12"
    run = tmp_path / "run.yaml"
    run.write_text(
        VALID_RUN_FILE
        + f"lora: {{r: {canary}}}\nruntime: {{password: tr0ub4dor, output_dir: {canary}}}\n",
        "utf-8",
    )
    result = envcheck("validate", run, "--format", form, "--set", f"model.revision={canary}")
    assert result.returncode == 1
    assert "SAFE001" in result.stdout
    assert "canary" not in result.stdout + result.stderr
    assert "tr0ub4dor" not in result.stdout + result.stderr


def test_unreadable_input_is_an_error(tmp_path: Path) -> None:
    """For a pipe without a writer, an endless device, a link loop, and a file that is too large or
    not UTF-8, the command ends within seconds with a finding.
    """
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"a: " + b"x" * (3 << 20))
    utf16 = tmp_path / "utf16.yaml"
    utf16.write_text(VALID_RUN_FILE, encoding="utf-16")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for path in (pipe, big, utf16, binary, loop, "/dev/zero", tmp_path / ("n" * 400)):
        start = time.monotonic()
        result = envcheck("validate", path)
        assert (result.returncode, "DOC014" in result.stdout) == (2, True), result
        assert time.monotonic() - start < 10  # the limit is 2 s, but a busy machine needs more
    result = envcheck("validate", f"/dev/fd/{0}", stdin=VALID_RUN_FILE)
    assert result.returncode == 0
    with open(os.devnull, "rb") as nothing:
        empty = subprocess.run(
            [ENVCHECK, "validate", "-"], stdin=nothing, capture_output=True, check=False
        )
    assert (empty.returncode, b"the run file is empty" in empty.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["validate"], "none.yaml: error[DOC014] cannot be read: No such file or directory"),
        (["validate", "--format", "github"], "::error file=none.yaml,title=DOC014::cannot be read"),
        (["size"], "error: none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_without_a_line(
    tmp_path: Path, arguments: list[str], output: str
) -> None:
    result = envcheck(*arguments, "none.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert (result.stdout + result.stderr).startswith(output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(VALID_RUN_FILE, "utf-8")
    run.chmod(0)
    assert envcheck("validate", run).returncode == 2


def test_a_reward_module_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(
        "open('ran', 'w')\ndef tone(prompts, completions, **columns):\n    return []\n", "utf-8"
    )
    run = tmp_path / "run.yaml"
    run.write_text(
        VALID_RUN_FILE.replace("exact_match", "'scores:tone'")
        + "runtime: {allow_code: [scores]}\n",
        "utf-8",
    )
    assert envcheck("validate", run, "--strict", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "ran").exists()
