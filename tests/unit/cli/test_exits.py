"""The message and the report of a defect of the toolkit, if there is no run folder."""

from __future__ import annotations

import os
import stat
import tempfile
from typing import TYPE_CHECKING

import pytest

from toolkit.base import defect
from toolkit.base.errors import ConfigError, DefectError
from toolkit.cli.exit_codes import report_errors

if TYPE_CHECKING:
    from pathlib import Path


def exit_code_and_stderr(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the stderr of a command that raises ``error``."""
    with pytest.raises(SystemExit) as end, report_errors():
        raise error
    return int(str(end.value.code)), capsys.readouterr().err


@pytest.fixture(autouse=True)
def without_run_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defect.RunContext, "folder", None)
    monkeypatch.setattr(defect.RunContext, "run", None)


@pytest.mark.parametrize("error", [KeyError("x"), DefectError("cannot be")])
def test_without_a_run_folder_the_report_is_in_the_current_folder(
    error, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stderr = exit_code_and_stderr(error, capsys)
    (report,) = tmp_path.glob("toolkit-defect-*.txt")
    assert code == 70
    assert f"this is a defect of the toolkit; the report is in {report}" in stderr
    text = report.read_text()
    assert f"{type(error).__name__}: {error}" in text
    assert "no run was loaded" in text
    assert stat.S_IMODE(report.stat().st_mode) == 0o644 & ~current_umask()


def test_a_folder_that_is_not_writable_is_skipped(tmp_path, monkeypatch, capsys) -> None:
    """The test uses a deleted folder, because root can write to a read-only folder."""
    deleted, temporary = tmp_path / "gone", tmp_path / "there"
    deleted.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(deleted)
    deleted.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    _, stderr = exit_code_and_stderr(KeyError("x"), capsys)
    (report,) = temporary.glob("toolkit-defect-*.txt")
    assert str(report) in stderr
    missing = tmp_path / "nowhere"
    monkeypatch.setattr(tempfile, "tempdir", str(missing))
    code, stderr = exit_code_and_stderr(KeyError("x"), capsys)
    assert code == 70
    assert "run again with --debug and attach the output" in stderr


def test_an_error_that_is_not_a_defect_writes_no_report(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, stderr = exit_code_and_stderr(ConfigError("is wrong", fix="mend it"), capsys)
    assert (code, stderr) == (1, "error: is wrong\n  fix: mend it\n")
    assert os.listdir(tmp_path) == []


def test_a_run_that_cannot_be_described_does_not_hide_the_report(tmp_path) -> None:
    def describe() -> dict[str, object]:
        raise ValueError("no")

    defect.set_run_context(tmp_path, describe)
    text = defect.report_text(KeyError("first"))
    assert "could not be described: ValueError: no" in text
    assert "KeyError: 'first'" in text


def test_secrets_and_the_home_folder_are_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    defect.set_run_context(tmp_path, lambda: {"grpo": {"hub_token": "abc", "beta": 0.1}})
    text = defect.report_text(OSError("cannot read /home/somebody/data"))
    assert '"hub_token": "[redacted]"' in text
    assert '"beta": 0.1' in text
    assert "somebody" not in text
    assert "~/data" in text


def current_umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_a_command_that_is_not_utf_8_has_a_report(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["toolkit", "\udcff"])
    code, _ = exit_code_and_stderr(KeyError("x"), capsys)
    (report,) = tmp_path.glob("toolkit-defect-*.txt")
    assert code == 70
    assert "\\udcff" in report.read_text()
