"""``extends`` shows no content of files that are not run files. An integer that does not fit into
64 bits is an error, whatever its length.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from validate_world import VALID_RUN_FILE

from toolkit.cli.validate import validate

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "root:$6$S3CR3T/hash:19000:0:99999:7:::\ndaemon:*:19000:0\n"
FORMS = ("text", "json", "sarif", "github")


def validate_output(run_file: Path, form: str = "text", **more: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        validate, [str(run_file), "--format", form], env={"TOOLKIT_EXTENDS_FROM": "", **more}
    )
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    return result.exit_code, result.output


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("location", ["outside", "link", "inside", "yaml inside", "mapping inside"])
def test_no_line_of_a_file_outside_the_folder_is_shown(
    tmp_path: Path, location: str, form: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    content = "password: S3CR3T\n" if location == "mapping inside" else SECRET
    name = {"outside": "../shadow", "link": "base.yaml", "inside": "shadow"}.get(location, "s.yaml")
    target = tmp_path / "shadow" if location in ("outside", "link") else folder / name
    target.write_text(content)
    if location == "link":
        (folder / name).symlink_to(target)
    run_file = folder / "run.yaml"
    run_file.write_text(f"extends: {name}\n{VALID_RUN_FILE}")
    code, text = validate_output(run_file, form)
    assert code == 1
    assert "S3CR3T" not in text
    rule = "DOC016" if location in ("outside", "link") else "DOC017"
    assert rule in text


def test_the_message_does_not_show_whether_a_file_outside_exists(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"extends: /nowhere/base.yaml\n{VALID_RUN_FILE}")
    assert "DOC016" in validate_output(tmp_path / "run.yaml")[1]


@pytest.mark.parametrize("through_middle", [False, True])
def test_a_base_in_an_allowed_folder_is_read(tmp_path: Path, through_middle: bool) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (tmp_path / "base.yaml").write_text(VALID_RUN_FILE)
    (folder / "middle.yaml").write_text("extends: ../base.yaml\n")
    run_file = folder / "run.yaml"
    run_file.write_text(f"extends: {'middle.yaml' if through_middle else '../base.yaml'}\n")
    code, text = validate_output(run_file)
    assert (code, "DOC016" in text) == (1, True)
    assert f"TOOLKIT_EXTENDS_FROM={tmp_path}" in text
    assert validate_output(run_file, TOOLKIT_EXTENDS_FROM=f"/nowhere{os.pathsep}{tmp_path}")[0] == 0


def test_a_base_that_is_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.yaml")
    (tmp_path / "run.yaml").write_text(f"extends: base.yaml\n{VALID_RUN_FILE}")
    code, text = validate_output(tmp_path / "run.yaml")
    assert (code, "base.yaml is a pipe, not a regular file" in text) == (1, True)


NUMBERS = ["9223372036854775808", "-9223372036854775809", "9" * 30, "9" * 500, "9" * 5000]


@pytest.mark.parametrize("number", NUMBERS, ids=len)
@pytest.mark.parametrize("form", ["yaml", "json", "toml", "set"])
def test_an_integer_beyond_64_bits_is_an_error(tmp_path: Path, number: str, form: str) -> None:
    path = tmp_path / f"run.{'yaml' if form == 'set' else form}"
    texts = {
        "yaml": f"{VALID_RUN_FILE}grpo:\n  max_steps: {number}\n",
        "json": '{"model": {"model_name": "x"}, "dataset": {"path": "x/y"},\n'
        ' "reward": {"functions": [{"name": "format"}]},'
        f' "grpo": {{"max_steps": {number}}}}}',
        "toml": 'dataset.path = "x/y"\nmodel.model_name = "x"\n'
        'reward.functions = [{name = "exact_match"}]\n'
        f"[grpo]\nmax_steps = {number}\n",
        "set": VALID_RUN_FILE,
    }
    path.write_text(texts[form])
    options = ["--set", f"grpo.max_steps={number}"] if form == "set" else []
    result = CliRunner().invoke(validate, [str(path), "--format", "json", *options])
    assert result.exit_code == 1
    errors = [one for one in json.loads(result.stdout)["findings"] if one["severity"] == "error"]
    assert [one["rule"] for one in errors] == ["DOC015"]
    assert "does not fit into 64 bits" in errors[0]["message"]
    assert f"({len(number)} characters)" in errors[0]["message"]
    assert len(errors[0]["message"]) < 200
    line = {"yaml": 5, "json": 2, "toml": 5, "set": 1}[form]
    assert errors[0]["line"] == line


def test_the_largest_integers_are_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'model.model_name = "x"\nreward.functions = [{name = "exact_match"}]\n'
        "grpo.seed = 9223372036854775807\n"
    )
    assert "DOC015" not in validate_output(tmp_path / "run.toml")[1]
