"""Every rule has an invalid file that gives exactly one finding, of this rule and at the expected
position, and a valid file that gives no finding.

The comments of a fixture name its finding (``# finds: RULE severity line:column``) and the command
line options for it (``# options:``). JSON has no comments, so ``JSON_FACTS`` has the findings of
the JSON fixtures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from toolkit.cli.validate import validate
from toolkit.config.key_moves import key_schema
from toolkit.config.rules import all_rules

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENVCHECK = Path(sys.executable).with_name("envcheck")
JSON_FACTS = {"GRPO001-json.json": ("GRPO001", "error", 4, 24)}
SUFFIXES = (".yaml", ".json", ".toml")
INVALID = sorted(p for p in (FIXTURES / "invalid").iterdir() if p.suffix in SUFFIXES)
VALID = sorted(p for p in (FIXTURES / "valid").iterdir() if p.suffix in SUFFIXES)


def comment(path: Path, name: str) -> str:
    """The text after ``# name:`` in a fixture; empty without such a comment."""
    found = re.search(rf"^# {name}: (.*)$", path.read_bytes().decode("latin-1"), re.MULTILINE)
    return found[1].strip() if found else ""


def validate_findings(path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Run ``envcheck validate`` in this process: the exit code and the findings of a fixture."""
    more = comment(path, "options").split()
    outcome = CliRunner().invoke(validate, [str(path), "--format", "json", *more, *options])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exc_info
    return outcome.exit_code, json.loads(outcome.stdout)["findings"]


def expected_finding(path: Path) -> tuple[str, str, int | None, int | None]:
    """(rule, severity, line, column) of an invalid fixture. Line and column are None if the finding
    is about the whole file.
    """
    if path.name in JSON_FACTS:
        return JSON_FACTS[path.name]
    rule, severity, *place = comment(path, "finds").split()
    line, column = map(int, place[0].split(":")) if place else (None, None)
    return rule, severity, line, column


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_an_invalid_file_gives_exactly_its_finding(path: Path) -> None:
    code, findings = validate_findings(path)
    rule, severity, line, column = expected_finding(path)
    told = [(f["rule"], f["severity"], f["line"], f["column"]) for f in findings]
    assert told == [(rule, severity, line, column)]
    unreadable = 2 if rule == "DOC014" else 1
    assert code == (unreadable if severity == "error" else 0)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.name)
def test_a_valid_file_gives_no_finding(path: Path) -> None:
    assert validate_findings(path, "--strict") == (0, [])


def test_every_rule_has_a_valid_and_an_invalid_file() -> None:
    rules = set(all_rules())
    assert rules == {expected_finding(path)[0] for path in INVALID}
    covered = {path.name.partition(".")[0].partition("-")[0] for path in VALID}
    assert not rules - covered


def copy_with_inputs(path: Path, folder: Path) -> Path:
    """Copy a fixture with the files that it refers to, so that its findings stay the same."""
    (folder / "parts").symlink_to(FIXTURES / "parts")
    (folder / "invalid").mkdir()
    shutil.copy(FIXTURES / "invalid" / "fixture_rewards.py", folder / "invalid")
    return Path(shutil.copy(path, folder / "invalid"))


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_a_fix_removes_the_finding(path: Path, tmp_path: Path) -> None:
    """If the finding has one fix, which edits the file, --fix removes the finding and keeps all
    comments. If the finding has several fixes, --fix changes nothing.
    """
    code, findings = validate_findings(path)
    fixes = [fix for found in findings for fix in found["fixes"]]
    if not any(fix["edits"] for fix in fixes):
        assert expected_finding(path)[0] not in FIXABLE, "this rule must have a fix"
        return
    copy = copy_with_inputs(path, tmp_path)
    before = copy.read_text(encoding="utf-8")
    after_code, after = validate_findings(copy, "--fix")
    text = copy.read_text(encoding="utf-8")
    if len(fixes) > 1:
        assert text == before
        assert [found["rule"] for found in after] == [found["rule"] for found in findings]
        return
    assert (after_code, after) == (0, []), f"exit code was {code}"
    assert text != before
    comments = [line for line in before.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in text.splitlines() if line.lstrip().startswith("#")] == comments


ADVICE = re.compile(r"((?:model|lora|dataset|grpo|runtime)\.\w+): (\S+)")


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_no_fix_leads_to_another_error(path: Path, tmp_path: Path) -> None:
    """Each fix, applied alone as an edit or as an override with --set, removes the finding and
    causes no new error.
    """
    _, findings = validate_findings(path)
    before = {(f["rule"], f["key"]) for f in findings}
    copy = copy_with_inputs(path, tmp_path)
    original = copy.read_bytes()
    text = original.decode("utf-8-sig", "replace")
    for found in findings:
        for fix in found["fixes"]:
            options: list[str] = []
            advice = ADVICE.fullmatch(fix["text"])
            if fix["edits"]:
                if any(Path(edit["file"]) != path for edit in fix["edits"]):
                    continue
                changed = text
                for edit in sorted(fix["edits"], key=lambda one: -one["start"]):
                    changed = changed[: edit["start"]] + edit["text"] + changed[edit["end"] :]
                copy.write_text(changed, encoding="utf-8")
            elif advice is not None:
                copy.write_bytes(original)
                options = ["--set", f"{advice[1]}={advice[2]}"]
            else:
                continue
            _, after = validate_findings(copy, *options)
            errors = {(f["rule"], f["key"]) for f in after if f["severity"] == "error"}
            assert errors <= before, fix
            kept = [(f["rule"], f["key"], f["message"]) for f in after]
            assert (found["rule"], found["key"], found["message"]) not in kept, fix


KEY_NAMES = re.compile(r"\b(?:model|lora|dataset|reward|grpo|runtime)\.\w+")


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_advice_names_only_valid_keys(path: Path) -> None:
    _, findings = validate_findings(path)
    for found in findings:
        for fix in found["fixes"]:
            for name in KEY_NAMES.findall(fix["text"]):
                assert key_schema(tuple(name.split("."))) is not None, (name, fix["text"])


FIXABLE = {
    "GRPO001", "GRPO002", "GRPO004", "GRPO005", "GRPO006", "GRPO008", "GRPO009", "GRPO015",
    "GRPO017", "GRPO020", "GRPO021", "GRPO022", "LEN001", "LEN002", "LORA001", "LORA002",
    "LORA003", "LORA005", "LORA006", "LORA009", "LORA010", "LOAD001", "LOAD002",
    "LOAD003", "LOAD004", "LOAD005", "LOAD007", "LOAD008", "LOAD010", "LOAD027", "TP001",
    "KEY003", "KEY004", "DOC007", "DATA001",
}  # fmt: skip


def test_a_folder_has_the_same_findings_as_its_files(tmp_path: Path) -> None:
    """One process that validates the whole folder gives the same findings as file by file."""
    folder = tmp_path / "invalid"
    shutil.copytree(FIXTURES / "parts", tmp_path / "parts")
    chosen = [
        path
        for path in INVALID
        if not comment(path, "options") and expected_finding(path)[0] != "DOC014"
    ]
    folder.mkdir()
    for path in [*chosen, FIXTURES / "invalid" / "fixture_rewards.py"]:
        shutil.copy(path, folder)
    for path in folder.glob("*.json"):
        path.unlink()  # without a model section, validate ignores it in a folder
    result = subprocess.run(
        [ENVCHECK, "validate", folder, "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOOLKIT_EXTENDS_FROM": str(tmp_path)},
    )
    assert (result.returncode, result.stderr) == (1, "")
    found = {Path(f["file"]).name: f["rule"] for f in json.loads(result.stdout)["findings"]}
    assert found == {p.name: expected_finding(p)[0] for p in chosen if p.suffix != ".json"}
