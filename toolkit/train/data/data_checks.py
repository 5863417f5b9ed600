"""What stands in a data set and is not what it seems: chats written as JSON text, answers that are
missing, prompts far longer than is kept, columns whose names mean something else to the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import compute

from toolkit.base.data_files import chat_in
from toolkit.base.errors import ConfigError
from toolkit.base.formatting import plural
from toolkit.config.reward_table import LEFT_OUT
from toolkit.train.data.arrow_columns import without_nulls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.train.data.prompt_format import Prompt

MIN_CHARACTERS = 1 << 16  # a prompt of fewer is always looked at whole
CHARACTERS_PER_TOKEN = 64  # at least so many are kept for each token of the limit ...
MOST_CHARACTERS_PER_TOKEN = 256  # ... and at most so many, of a vocabulary with longer tokens


def prompts_in(values: list[Any]) -> tuple[list[Any], list[str]]:
    """The prompts of a column, and notes on what was done to them.

    A column of which every text is a chat in JSON holds chats. Where only some are, all are texts.
    """
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    chats = {text: chat for text in texts if (chat := chat_in(text)) is not None}
    if not chats:
        return [without_nulls(value) for value in values], []
    written = sum(text in chats for text in texts)
    if written < len(texts):
        note = (
            f"{written} of {len(texts)} prompts are chats written as JSON text, the others are "
            "not: all are taken as plain texts"
        )
        return values, [note]
    found = [chats.get(value, value) if isinstance(value, str) else value for value in values]
    return found, ["the prompts are chats written as JSON text: they were read as chats"]


def answers_in(column: pa.ChunkedArray, name: str, path: str) -> tuple[pa.ChunkedArray, int]:
    """The answers with every NaN (what pandas writes for nothing) null, and how many are null.

    Rewards that compare score a null answer None. Raises ConfigError where all are.
    """
    if pa.types.is_floating(column.type):
        column = compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)
    if len(column) and column.null_count == len(column):
        raise ConfigError(
            f"column {name!r} has no answer: it is null in all of its {len(column)} rows",
            where=path,
            fix="fill the column, or leave dataset.answer out where no reward compares",
        )
    return column, column.null_count


def answer_note(missing: int, rows: int) -> list[str]:
    """How many answers are missing, for the report."""
    if not missing:
        return []
    verb = "has" if missing == 1 else "have"
    what = f"{missing} of {plural(rows, 'row')} {verb} no answer (null)"
    return [f"{what}: rewards that compare with it leave them out"]


def left_out(names: Sequence[str], used: Sequence[str]) -> dict[str, str]:
    """The columns that the trainer does not get, each with the reason, unless the run file uses
    them under another name.
    """
    return {
        name: LEFT_OUT[name].format(name=name)
        for name in names
        if name in LEFT_OUT and name not in used
    }


def shortened(tokenizer: Any, prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The prompts without beginnings that cannot be kept under ``limit`` tokens, so that nobody
    tokenizes megabytes to keep a few hundred tokens. What is left is longer than the limit still.
    """
    if limit is None or all(_characters(prompt) <= MIN_CHARACTERS for prompt in prompts):
        return prompts
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    each = min(max(longest, CHARACTERS_PER_TOKEN), MOST_CHARACTERS_PER_TOKEN)
    most = max(MIN_CHARACTERS, (limit + 1) * each)
    return [_last(prompt, most) if _characters(prompt) > most else prompt for prompt in prompts]


def _characters(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(
        len(message["content"]) for message in prompt if isinstance(message.get("content"), str)
    )


def _last(prompt: Prompt, most: int) -> Prompt:
    """The last ``most`` characters; of a chat those of its messages but the system's."""
    if isinstance(prompt, str):
        return prompt[-most:]
    kept: list[dict[str, Any]] = []
    left = most
    for message in reversed(prompt):
        text = message.get("content")
        if isinstance(text, str) and message["role"] not in ("system", "developer"):
            message = {**message, "content": text[-left:] if left else ""}
            left -= min(left, len(text))
        kept.append(message)
    return kept[::-1]
