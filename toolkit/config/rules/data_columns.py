"""Rules on data that training would use differently than expected: columns that rewards do not
receive, missing answers, and chats that are written as text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.data_facts import read_data_facts
from toolkit.config.finding import Fix, Severity
from toolkit.config.reward_table import WITHHELD_COLUMNS
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_PATH_KEYS = ("path", "eval_path")


@rule(
    "DATA020",
    "dataset.path dataset.eval_path",
    example="dataset:\n  path: train.jsonl  # with a column images",
    fix="rename the column",
    severity=Severity.WARNING,
)
def columns_reach_the_rewards(run: Run) -> Iterator[RuleViolation]:
    """No column has a name that the trainer reserves.

    The trainer drops such a column, so rewards do not receive it. dataset.prompt and dataset.answer
    may name such a column, because rewards receive it as the prompt or the answer.
    """
    prompt_and_answer = {run.value("dataset.prompt"), run.value("dataset.answer")}
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        for name in (data.columns or ()) if data is not None else ():
            if name in WITHHELD_COLUMNS and name not in prompt_and_answer:
                assert data is not None
                reason = WITHHELD_COLUMNS[name].format(name=name)
                yield RuleViolation(
                    f"dataset.{path_key}",
                    f"{data.path.name} has a column {name}, which is dropped: {reason}",
                    fixes=(Fix(f"rename the column, for instance to {name}_column"),),
                )


@rule(
    "DATA021",
    "dataset.path dataset.eval_path dataset.answer",
    example="dataset:\n  path: train.jsonl  # some rows have a null answer\n  answer: answer",
    fix="remove the rows without an answer, or fill in their answers",
    severity=Severity.WARNING,
)
def answers_are_present(run: Run) -> Iterator[RuleViolation]:
    """No answer is null.

    Rewards that compare a completion with the answer skip a row without an answer, so training
    learns nothing from this row. The finding is an error if every answer is null.
    """
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        if data is None or not data.missing_answers:
            continue
        all_unanswered = data.is_complete and data.missing_answers == data.rows
        qualifier = "" if data.is_complete else " first"
        yield RuleViolation(
            f"dataset.{path_key}",
            f"{data.missing_answers} of {data.rows}{qualifier} rows have no answer (null)",
            related=("dataset.answer",),
            fixes=(Fix("remove the rows without an answer, or fill in their answers"),),
            severity=Severity.ERROR if all_unanswered else None,
        )


@rule(
    "DATA022",
    "dataset.path dataset.eval_path dataset.prompt",
    example='dataset:\n  path: train.jsonl  # some prompts are \'[{"role": "user", ...}]\'',
    fix="write all prompts as chats, or all as plain text",
    severity=Severity.WARNING,
)
def chats_are_all_or_none(run: Run) -> Iterator[RuleViolation]:
    """If one prompt is a chat written as JSON text, all prompts must be chats written as JSON text.

    If all prompts are chats in JSON, they are read as chats. If only some prompts are chats in
    JSON, all prompts are read as plain text, and the model sees the JSON.
    """
    for path_key in _PATH_KEYS:
        data = read_data_facts(run.document, path_key)
        if data is None or not 0 < data.json_chats < data.rows - data.empty_prompts:
            continue
        yield RuleViolation(
            f"dataset.{path_key}",
            f"{data.json_chats} of the {'' if data.is_complete else 'first '}{data.rows} prompts "
            "are chats written as JSON text, but the others are not, so all prompts are read as "
            "plain text",
            related=("dataset.prompt",),
            fixes=(
                Fix("write all prompts as lists of {role, content} messages, or all as plain text"),
            ),
        )
