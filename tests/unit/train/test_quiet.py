"""What upstream says is kept away, what we say is not, and all is put back afterwards."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from toolkit.base.errors import ToolkitWarning
from toolkit.train.logging_setup import UPSTREAM_LOGGERS, upstream_silenced


def speak() -> None:
    warnings.warn("upstream's", UserWarning, stacklevel=1)
    warnings.warn("upstream's too", FutureWarning, stacklevel=1)
    warnings.warn("padding with '</s>'", ToolkitWarning, stacklevel=1)
    warnings.warn("padding with '</s>'", ToolkitWarning, stacklevel=1)
    logging.getLogger("trl.trainer").warning("trl's")
    logging.getLogger("toolkit.train.step.step_errors").warning("rollout: out of memory with %d", 8)
    logging.getLogger("toolkit.train.step.step_errors").info("not this")


def test_only_what_we_say_is_said(capsys):
    with upstream_silenced(debug=False):
        speak()
    assert capsys.readouterr().err.splitlines() == [
        "warning: padding with '</s>'",
        "warning: padding with '</s>'",
        "warning: rollout: out of memory with 8",
    ]


@pytest.mark.parametrize(("kind", "start"), [("xterm", "\r\x1b[K"), ("dumb", ""), (None, "")])
def test_a_line_on_a_terminal_takes_the_place_of_progress(capsys, monkeypatch, kind, start):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", kind) if kind else monkeypatch.delenv("TERM", raising=False)
    with upstream_silenced(debug=False):
        warnings.warn("ours", ToolkitWarning, stacklevel=1)
    assert capsys.readouterr().err == f"{start}warning: ours\n"


def test_debug_changes_nothing(caplog):
    with upstream_silenced(debug=True), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        speak()
    assert len(seen) == 4
    assert "trl's" in caplog.text


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(raises):
    before = {name: logging.getLogger(name).level for name in UPSTREAM_LOGGERS}
    shown, filters = warnings.showwarning, list(warnings.filters)
    ours = logging.getLogger("toolkit")
    kept = list(ours.handlers), ours.propagate
    try:
        with upstream_silenced(debug=False):
            if raises:
                raise KeyError("a run that fails")
    except KeyError:
        assert raises
    assert {name: logging.getLogger(name).level for name in UPSTREAM_LOGGERS} == before
    assert (warnings.showwarning, list(warnings.filters)) == (shown, filters)
    assert (list(ours.handlers), ours.propagate) == kept
