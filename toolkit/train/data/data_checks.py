"""Find common mistakes in a dataset: chats written as JSON text, missing answers, prompts far
longer than the limit, and columns whose names the trainer uses for other values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import compute

from toolkit.base.data_files import parse_chat
from toolkit.base.errors import ConfigError
from toolkit.base.formatting import plural
from toolkit.config.reward_table import WITHHELD_COLUMNS
from toolkit.train.data.arrow_columns import without_nulls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from toolkit.train.data.prompt_format import Prompt

MIN_CHARACTERS = 1 << 16  # prompts of at most this many characters are always read whole
MIN_CHARACTERS_PER_TOKEN = 64  # at least this many characters are kept per token of the limit
MAX_CHARACTERS_PER_TOKEN = 256  # at most this many, if the vocabulary has longer tokens


def parse_prompts(values: list[Any]) -> tuple[list[Any], list[str]]:
    """Return the prompts of a column, and notes that tell the user how the prompts were read.

    If every text of the column is a chat in JSON, the prompts are read as chats. If only some texts
    are chats in JSON, all prompts stay texts.
    """
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    chats = {text: chat for text in texts if (chat := parse_chat(text)) is not None}
    if not chats:
        return [without_nulls(value) for value in values], []
    chat_count = sum(text in chats for text in texts)
    if chat_count < len(texts):
        note = (
            f"{chat_count} of {len(texts)} prompts are chats written as JSON text, the others are "
            "not: all prompts are used as plain texts"
        )
        return values, [note]
    prompts = [chats.get(value, value) if isinstance(value, str) else value for value in values]
    return prompts, ["the prompts are chats written as JSON text: they were read as chats"]


def clean_answers(column: pa.ChunkedArray, name: str, path: str) -> tuple[pa.ChunkedArray, int]:
    """Return the answers of a column, and how many of them are null. NaN, which pandas writes for a
    missing value, is replaced by null.

    Rewards that compare with the answer return None for a null answer. Raises ConfigError if all
    answers are null.
    """
    if pa.types.is_floating(column.type):
        column = compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)
    if len(column) and column.null_count == len(column):
        raise ConfigError(
            f"column {name!r} has no answers: all {len(column)} values are null",
            where=path,
            fix="fill the column, or remove `dataset.answer` if no reward uses answers",
        )
    return column, column.null_count


def missing_answers_note(missing_count: int, row_count: int) -> list[str]:
    """Return a list with a line for the report that says how many answers are missing. The list is
    empty if no answer is missing.
    """
    if not missing_count:
        return []
    verb = "has" if missing_count == 1 else "have"
    summary = f"{missing_count} of {plural(row_count, 'row')} {verb} no answer (null)"
    return [f"{summary}: rewards that compare with the answer do not score them"]


def left_out_columns(names: Sequence[str], used: Sequence[str]) -> dict[str, str]:
    """Return {column: reason} for the columns of ``names`` that are not passed to the trainer.
    Columns in ``used`` are never in the result, because they are the prompt or the answer column of
    the run file.
    """
    return {
        name: WITHHELD_COLUMNS[name].format(name=name)
        for name in names
        if name in WITHHELD_COLUMNS and name not in used
    }


def pretruncate_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], limit: int | None
) -> list[Prompt]:
    """Remove the beginning of very long prompts before the prompts are tokenized. Without this
    step, megabytes of text would be tokenized to keep a few hundred tokens. A shortened prompt
    still has more than ``limit`` tokens. ``prompt_format.truncate_prompt`` applies the exact limit
    later.
    """
    if limit is None or all(_count_characters(prompt) <= MIN_CHARACTERS for prompt in prompts):
        return prompts
    longest_token = max(map(len, tokenizer.get_vocab()), default=1)
    per_token = min(max(longest_token, MIN_CHARACTERS_PER_TOKEN), MAX_CHARACTERS_PER_TOKEN)
    max_characters = max(MIN_CHARACTERS, (limit + 1) * per_token)
    return [
        _last_characters(prompt, max_characters)
        if _count_characters(prompt) > max_characters
        else prompt
        for prompt in prompts
    ]


def _count_characters(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(
        len(message["content"]) for message in prompt if isinstance(message.get("content"), str)
    )


def _last_characters(prompt: Prompt, max_characters: int) -> Prompt:
    """Return the last ``max_characters`` characters of a prompt. In a chat, the system message is
    kept in addition.
    """
    if isinstance(prompt, str):
        return prompt[-max_characters:]
    messages: list[dict[str, Any]] = []
    remaining = max_characters
    for message in reversed(prompt):
        text = message.get("content")
        if isinstance(text, str) and message["role"] not in ("system", "developer"):
            message = {**message, "content": text[-remaining:] if remaining else ""}
            remaining -= min(remaining, len(text))
        messages.append(message)
    return messages[::-1]
