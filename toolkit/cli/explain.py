"""``envcheck explain``: explain a rule, a check, a key, a metric, the exit codes, or a
traceback.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from toolkit.base.errors import EXIT_CODES, UnestablishedError
from toolkit.cli.render import wrap_text

if TYPE_CHECKING:
    from toolkit.base.symptoms import Symptom

MAX_PASTED_BYTES = 256 << 20


@click.command("explain")
@click.argument("what", nargs=-1, required=True, metavar="ID|KEY|METRIC|exit-codes|rules|metrics|-")
def explain(what: tuple[str, ...]) -> None:
    """Explain a rule, a check, a key of a run file, a metric, the exit codes, or a traceback.

    For a rule or a check, the explanation says what it looks for, why, and what to do. For a key,
    it says which values the key accepts. For a metric (a value in a log of a run), it says what the
    value means.

    \b
        envcheck explain GRPO001                a rule of envcheck validate
        envcheck explain num_generations        a key of a run file
        envcheck explain steps_without_signal   a value in metrics.jsonl or timings.jsonl
        envcheck explain exit-codes             what the exit codes mean
        envcheck explain rules                  all rules
        envcheck explain metrics                all metrics
        envcheck explain - < error.txt          a traceback: its cause and the remedy
    """
    click.echo("\n\n".join(_explain_word(word) for word in what))


def _explain_word(word: str) -> str:
    if word == "-":
        return _explain_traceback(
            sys.stdin.buffer.read(MAX_PASTED_BYTES).decode("utf-8", errors="replace")
        )
    from toolkit.config.explain import explain as explain_name  # noqa: PLC0415 - after parsing
    from toolkit.config.explain import unknown_topic_error  # noqa: PLC0415

    text = explain_name(word) or _explain_check(word)
    if text is None:
        raise unknown_topic_error(word, _check_names())
    return text


def _check_names() -> list[str]:
    from toolkit.gpu.checks import checks_by_id  # noqa: PLC0415 - only if the word is neither a rule nor a key

    return list(checks_by_id())


def _explain_check(word: str) -> str | None:
    """Return the explanation of the check with the id ``word``; None if no check has this id."""
    from toolkit.gpu.checks import checks_by_id  # noqa: PLC0415 - only if the word is neither a rule nor a key

    check = checks_by_id().get(word.lower())
    if check is None:
        return None
    head = f"{check.id} (a check of envcheck check)"
    return "\n".join(
        (head, f"  {check.title}", "", wrap_text(check.why, first="  ", indent="  "), "",
         wrap_text(f"Fix: {check.remedy}", indent="  "))
    )  # fmt: skip


def _explain_traceback(text: str) -> str:
    """Return the explanation of every known error in a traceback: its remedy, and the check that
    finds the error before a run.

    Raises UnestablishedError if the traceback contains no known error.
    """
    from toolkit.base.symptoms import find_symptoms  # noqa: PLC0415 - only for a traceback

    symptoms = find_symptoms(text)
    if not symptoms:
        raise _no_known_error(text)
    return "\n\n".join(_format_symptom(symptom) for symptom in symptoms)


def _no_known_error(text: str) -> UnestablishedError:
    """Return the error for a traceback that contains no known error. The message lists the known
    errors that are most similar.
    """
    from toolkit.base.symptoms import similar_symptoms  # noqa: PLC0415 - only for a traceback

    similar = [f"{symptom.title} ({symptom.check})" for symptom in similar_symptoms(text)]
    similar_list = "; the most similar known errors:\n  " + "\n  ".join(similar) if similar else ""
    return UnestablishedError(
        f"no known error found{similar_list}",
        where="explain -",
        fix="run `envcheck check --config run.yaml` and `envcheck size run.yaml` to find the cause",
    )


def _format_symptom(symptom: Symptom) -> str:
    rows = (
        ("found by", ", ".join(_finding_command(check) for check in symptom.check.split(", "))),
        ("remedy", symptom.remedy),
        ("exit code", f"{symptom.exit_code} ({EXIT_CODES[symptom.exit_code]})"),
    )
    return "\n".join(
        [symptom.title]
        + [wrap_text(text, first=f"  {name}: ".ljust(13), indent=" " * 13) for name, text in rows]
    )


def _finding_command(check: str) -> str:
    """Return the command that finds a known error before the run, followed by a text in
    parentheses. For ``envcheck size``, this text names the number in the output that shows the
    error. For the other commands, it is the rule or the check that finds the error. If no command
    finds the error, the result says so. ``check`` is the field ``check`` of a Symptom.
    """
    if check.startswith("none: "):
        return f"nothing before the run ({check.removeprefix('none: ')})"
    if check.startswith("size: "):
        return f"envcheck size run.yaml ({check.removeprefix('size: ')})"
    return f"envcheck {'validate' if check[0].isupper() else 'check'} ({check})"
