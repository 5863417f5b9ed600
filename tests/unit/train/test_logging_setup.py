"""Messages of upstream libraries are hidden, and messages of the toolkit are shown. The loggers
and the warning filters are restored at the end.
"""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from toolkit.base.errors import ToolkitWarning
from toolkit.train.logging_setup import UPSTREAM_LOGGERS, upstream_silenced


def warn_and_log() -> None:
    warnings.warn("upstream's", UserWarning, stacklevel=1)
    warnings.warn("upstream's too", FutureWarning, stacklevel=1)
    warnings.warn("padding with '</s>'", ToolkitWarning, stacklevel=1)
    warnings.warn("padding with '</s>'", ToolkitWarning, stacklevel=1)
    logging.getLogger("trl.trainer").warning("trl's")
    logging.getLogger("toolkit.train.step.step_errors").warning("rollout: out of memory with %d", 8)
    logging.getLogger("toolkit.train.step.step_errors").info("not this")


def test_only_messages_of_the_toolkit_are_shown(capsys):
    with upstream_silenced(debug=False):
        warn_and_log()
    assert capsys.readouterr().err.splitlines() == [
        "warning: padding with '</s>'",
        "warning: padding with '</s>'",
        "warning: rollout: out of memory with 8",
    ]


@pytest.mark.parametrize(("kind", "start"), [("xterm", "\r\x1b[K"), ("dumb", ""), (None, "")])
def test_a_message_replaces_the_progress_line_on_a_terminal(capsys, monkeypatch, kind, start):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", kind) if kind else monkeypatch.delenv("TERM", raising=False)
    with upstream_silenced(debug=False):
        warnings.warn("ours", ToolkitWarning, stacklevel=1)
    assert capsys.readouterr().err == f"{start}warning: ours\n"


def test_debug_hides_nothing(caplog):
    with upstream_silenced(debug=True), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_and_log()
    assert len(seen) == 4
    assert "trl's" in caplog.text


@pytest.mark.parametrize("raises", [False, True])
def test_loggers_and_warnings_are_restored(raises):
    levels = {name: logging.getLogger(name).level for name in UPSTREAM_LOGGERS}
    showwarning, filters = warnings.showwarning, list(warnings.filters)
    logger = logging.getLogger("toolkit")
    logger_state = list(logger.handlers), logger.propagate
    try:
        with upstream_silenced(debug=False):
            if raises:
                raise KeyError("a run that fails")
    except KeyError:
        assert raises
    assert {name: logging.getLogger(name).level for name in UPSTREAM_LOGGERS} == levels
    assert (warnings.showwarning, list(warnings.filters)) == (showwarning, filters)
    assert (list(logger.handlers), logger.propagate) == logger_state
