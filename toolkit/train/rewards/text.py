"""What a reward reads: the text of a completion, the part between tags, a column of the dataset."""

from __future__ import annotations

import re
from typing import Any

from toolkit.base.errors import ConfigError


def text_of(completion: Any) -> str:
    """The text of a completion: itself if plain, else what the assistant said last.

    A message without content (a bare tool call) is the empty text; content in parts is joined.
    """
    if isinstance(completion, str):
        return completion
    messages = [m for m in completion if isinstance(m, dict)]
    spoken = [m for m in messages if m.get("role") == "assistant"] or messages
    content = spoken[-1].get("content") if spoken else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def inside_tag(text: str, tag: str) -> str | None:
    """What stands in the last ``<tag>...</tag>`` of ``text``; None where there is none."""
    name = re.escape(tag)
    found = re.findall(rf"<{name}>((?:(?!<{name}>)[\s\S])*?)</{name}>", text)
    return found[-1] if found else None


def column_of(columns: dict[str, Any], name: str, reward: str) -> list[Any]:
    """The dataset column that ``reward`` compares with; ConfigError naming those there are."""
    if name in columns:
        values: list[Any] = columns[name]
        return values
    there = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list)))
    raise ConfigError(
        f"reward {reward} needs the column {name!r}; the dataset passes on: {there or 'none'}",
        fix="set dataset.answer to the column with the answers, or the reward's option column",
    )
