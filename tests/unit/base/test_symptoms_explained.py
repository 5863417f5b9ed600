"""At least 90 error texts of other libraries are explained with the check that finds the problem
and with the exit code. If a text has numbers, the remedy has the value to set.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolkit.base.errors import ConfigError, NodeError, RetryError, UnestablishedError
from toolkit.base.symptoms import CONSEQUENCES, SYMPTOMS, find_symptoms, similar_symptoms
from toolkit.base.symptoms.errors import explain_error
from toolkit.base.symptoms.pasted import condense
from toolkit.cli.envcheck import cli
from toolkit.cli.exit_codes import report_errors
from toolkit.gpu.checks import checks_by_id

FIXTURE = Path(__file__).parents[2] / "fixtures" / "symptom_texts.jsonl"
NAMES = ("symptom", "exit_code", "check", "remedy", "text")
TEXTS = [
    tuple(json.loads(line)[name] for name in NAMES)
    for line in FIXTURE.read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    ("symptom", "code", "check", "remedy", "text"), TEXTS, ids=lambda value: str(value)[:24]
)
def test_an_upstream_text_is_explained(
    symptom: str, code: int, check: str, remedy: str, text: str
) -> None:
    found = find_symptoms(f"Traceback (most recent call last):\n  ...\n{text}\n")
    assert [one.id for one in found][:1] == [symptom], found
    assert (found[0].exit_code, found[0].check.split(", ")[0]) == (code, check)
    assert remedy in found[0].remedy


def test_there_are_texts_for_every_check_and_every_symptom() -> None:
    assert len({row[-1] for row in TEXTS}) >= 90
    assert {row[0] for row in TEXTS} == {one.id for one in SYMPTOMS}
    named = {
        name for row in TEXTS for one in find_symptoms(row[-1]) for name in one.check.split(", ")
    }
    assert set(checks_by_id()) - named == set()


@pytest.mark.parametrize("at", [40, 70_000])
def test_a_log_of_20_megabytes_is_explained_in_under_a_second(at: int) -> None:
    """The log has colours, lines of several ranks, and line ends of Windows. The error is near the
    start, or between many lines with the same words.
    """
    lines = [
        f"\x1b[36m(EngineCore_DP0 pid={n % 8})\x1b[0m INFO 11-24 12:10:28 [core.py:7] at {n}\r\n"
        f"[rank{n % 8}]: seen {n} \x1b[32mloss\x1b[0m 0.{n}, Error rate 0, memory fine\r\n"
        for n in range(75_000)
    ]
    first = "".join(f"[rank{rank}]: {TEXTS[0][-1]}\r\n[rank3]: step\r\n" for rank in range(2))
    log = "".join([*lines[:at], first, *lines, *lines[:80_000]])
    assert len(log) > 20_000_000
    start = time.process_time()
    found = find_symptoms(log)
    assert time.process_time() - start < 1
    assert [one.id for one in found] == [TEXTS[0][0]]


def test_a_condensed_log_keeps_every_text() -> None:
    filler = "".join(f"step {n}: reward 0.{n}\n" for n in range(3000))
    for symptom, *_, text in TEXTS:
        log = filler + text.replace("\n", "\r\n") + "\r\n" + filler
        assert symptom in {one.id for one in find_symptoms(condense(log, 4000))}, text


def test_the_mixed_output_of_two_ranks_is_separated() -> None:
    text = next(row[-1] for row in TEXTS if row[0] == "graph-capture").split("\n")
    other = ["  File 'a.py'", "waiting", "waiting"]
    log = "\n".join(
        line
        for pair in zip(text, other, strict=True)
        for line in (f"[rank1]: {pair[0]}", f"[rank0]: {pair[1]}")
    )
    assert [one.id for one in find_symptoms(log)] == ["graph-capture"]


def test_an_unknown_text_exits_with_5_and_lists_similar_symptoms() -> None:
    text = "RuntimeError: the NVIDIA driver of your system is much too old (version 11040)"
    assert find_symptoms(text) == []
    assert "driver-too-old" in [one.id for one in similar_symptoms(text)]
    done = CliRunner().invoke(cli, ["explain", "-"], input=text)
    assert isinstance(done.exception, UnestablishedError)
    assert done.exception.exit_code == 5
    assert "driver.cuda" in str(done.exception)
    assert similar_symptoms("all is well") == []


def test_a_command_and_explain_print_the_same_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = {1: ConfigError, 3: NodeError, 4: RetryError, 5: UnestablishedError}
    for symptom, code, *_, text in TEXTS:
        error = explain_error(RuntimeError(text), "it failed")
        if symptom in CONSEQUENCES:
            assert error is None
            continue
        assert type(error) is kinds[code], symptom
        assert error.fix == find_symptoms(text)[0].remedy
    text = TEXTS[0][-1]
    with pytest.raises(SystemExit) as end, report_errors():
        raise RuntimeError(text)
    assert end.value.code == 3
    output = CliRunner().invoke(cli, ["explain", "-"], input=text).output
    assert find_symptoms(text)[0].title in output
    assert find_symptoms(text)[0].title in capsys.readouterr().err


def test_a_consequence_is_reported_only_without_another_symptom() -> None:
    """The text of a consequence names no cause. If the log also has the cause, only the cause is
    reported.
    """
    ended = [text for symptom, *_, text in TEXTS if symptom in CONSEQUENCES]
    cause = next(text for symptom, *_, text in TEXTS if symptom == "no-kernel-image")
    for text in ended:
        assert [one.exit_code for one in find_symptoms(text)] == [5]
        assert [one.id for one in find_symptoms(f"{cause}\n{text}")] == ["no-kernel-image"]
        result = CliRunner().invoke(cli, ["explain", "-"], input=text)
        assert result.exit_code == 0
        assert "could not be established" in result.output
