"""The built-in rewards. Each reward is a dataclass whose fields are its options.

TRL calls a reward with ``(prompts, completions, **columns)``. Completions are texts or lists of
chat messages. A reward returns a list with one float per completion. The value is None if the
dataset has no answer for the completion. The same completions always get the same rewards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.base.errors import ConfigError
from toolkit.train.rewards.number_parsing import answer_in, is_same_number, to_number

if TYPE_CHECKING:
    from collections.abc import Sequence


def text_of(completion: Any) -> str:
    """The text of a completion. If the completion is a chat, this is the text of its last assistant
    message.

    If the content of the message is a list of parts, the texts of the parts are joined. If the
    message has no content (only a tool call), the text is empty.
    """
    if isinstance(completion, str):
        return completion
    messages = [m for m in completion if isinstance(m, dict)]
    assistant_messages = [m for m in messages if m.get("role") == "assistant"] or messages
    content = assistant_messages[-1].get("content") if assistant_messages else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def inside_tag(text: str, tag: str) -> str | None:
    """The text in the last ``<tag>...</tag>`` of ``text``. None if there is no such tag."""
    name = re.escape(tag)
    contents = re.findall(rf"<{name}>((?:(?!<{name}>)[\s\S])*?)</{name}>", text)
    return contents[-1] if contents else None


def column_of(columns: dict[str, Any], name: str, reward: str) -> list[Any]:
    """The values of the dataset column ``name``, for the reward ``reward``.

    Raises ConfigError if the column does not exist. The error lists the existing columns.
    """
    if name in columns:
        values: list[Any] = columns[name]
        return values
    existing = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list)))
    raise ConfigError(
        f"reward {reward} needs the column {name!r}. Columns of the dataset: {existing or 'none'}",
        fix="set dataset.answer to the column with the answers, or set the option `column` of the "
        "reward",
    )


Score = float | None


@dataclass(frozen=True, kw_only=True)
class AnswerReward:
    """The base class of rewards that compare each completion with an answer from the dataset.

    ``column`` is the name of the column with the answers. With ``tag``, only the text in the last
    ``<tag>...</tag>`` of a completion is compared, and a completion without the tag scores 0.
    """

    name: ClassVar[str]
    column: str = "answer"
    tag: str | None = None

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        del prompts
        answers = column_of(columns, self.column, self.name)
        return [
            self._score_completion(text_of(c), a) for c, a in zip(completions, answers, strict=True)
        ]

    def _score_completion(self, text: str, answer: object) -> Score:
        if answer is None:
            return None
        compared_text = inside_tag(text, self.tag) if self.tag else text
        return 0.0 if compared_text is None else self.score(compared_text, answer)

    def score(self, text: str, answer: object) -> Score:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ExactMatch(AnswerReward):
    """1 if the completion equals the answer after white space is normalised, else 0."""

    name: ClassVar[str] = "exact_match"
    ignore_case: bool = False

    def score(self, text: str, answer: object) -> Score:
        guess, gold = " ".join(text.split()), " ".join(str(answer).split())
        if self.ignore_case:
            guess, gold = guess.casefold(), gold.casefold()
        return float(guess == gold)


@dataclass(frozen=True, kw_only=True)
class NumericMatch(AnswerReward):
    """1 if the number in the completion equals the number in the answer, else 0.

    The number is the one after ``####``, else the one in ``\\boxed{}``, else the last one in the
    text (see ``rewards/number_parsing.py``). If the dataset's answer has no number, the score is
    None. With ``tolerance``, the numbers may differ by at most ``tolerance`` * max(1, |answer|).
    """

    name: ClassVar[str] = "numeric_match"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ConfigError(f"numeric_match: tolerance must be in [0, 1), not {self.tolerance}")

    def score(self, text: str, answer: object) -> Score:
        gold = to_number(answer)
        if gold is None:
            return None
        guess = answer_in(text)
        return float(guess is not None and is_same_number(guess, gold, self.tolerance))


@dataclass(frozen=True, kw_only=True)
class RegexMatch:
    """1 if ``pattern`` (Python's re) is found in the completion, else 0.

    With ``full`` the pattern must match the whole completion.
    """

    name: ClassVar[str] = "regex_match"
    pattern: str
    full: bool = False
    ignore_case: bool = False

    def __post_init__(self) -> None:
        try:
            self._compiled()
        except re.error as error:
            raise ConfigError(
                (
                    f"regex_match: the pattern {self.pattern!r} is not a valid regular "
                    f"expression: {error}"
                ),
                fix="correct the pattern. In YAML, put the pattern in single quotes, which keep "
                "backslashes",
            ) from error

    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)  # re caches it

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        del prompts, columns
        compiled = self._compiled()
        find = compiled.fullmatch if self.full else compiled.search
        return [float(find(text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Format:
    """1 if the completion contains ``<tag>...</tag>`` exactly once for each of ``tags``, in this
    order. Otherwise 0.

    With ``strict``, only white space may be outside the tags. Use ``opened`` if the prompt already
    ends with the first opening tag, as in the chat templates of some reasoning models. With
    ``partial``, a completion with a wrong format scores 0.5 x the share of tags that occur exactly
    once.
    """

    name: ClassVar[str] = "format"
    tags: tuple[str, ...] = ("think", "answer")
    strict: bool = True
    opened: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        if not self.tags or len(set(self.tags)) != len(self.tags):
            raise ConfigError(
                f"format: tags is {self.tags}, but it must have at least one name, and all names "
                "must differ"
            )

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        del prompts, columns
        start = f"<{self.tags[0]}>" if self.opened else ""
        return [self.score(start + text_of(completion)) for completion in completions]

    def score(self, text: str) -> float:
        occurs_once = [text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in self.tags]
        if all(occurs_once) and self._tags_in_order(text):
            return 1.0
        return 0.5 * sum(occurs_once) / len(occurs_once) if self.partial else 0.0

    def _tags_in_order(self, text: str) -> bool:
        end, outside = 0, ""
        for tag in self.tags:
            opening, closing = text.find(f"<{tag}>", end), text.find(f"</{tag}>", end)
            if not 0 <= opening < closing:
                return False
            outside += text[end:opening]
            end = closing + len(f"</{tag}>")
        return not (self.strict and (outside + text[end:]).strip())


@dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """A penalty for long completions: 0 up to ``max_length - margin``, then falling linearly to -1
    at ``max_length`` and beyond.

    This is the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13). A length is the
    number of completion tokens, or of characters with ``unit: characters``.
    """

    name: ClassVar[str] = "length_penalty"
    max_length: int
    margin: int = 0
    unit: str = "tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= self.max_length or self.max_length < 1:
            raise ConfigError(
                f"length_penalty: margin is {self.margin} and max_length is {self.max_length}, but "
                "margin must be from 0 to max_length, and max_length must be at least 1"
            )
        if self.unit not in ("tokens", "characters"):
            raise ConfigError(
                f"length_penalty: unit must be tokens or characters, not {self.unit!r}"
            )

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        del prompts
        if self.unit == "characters":
            lengths = [len(text_of(completion)) for completion in completions]
        else:
            lengths = [len(ids) for ids in column_of(columns, "completion_ids", self.name)]
        return [self.score(length) for length in lengths]

    def score(self, length: int) -> float:
        excess = length - (self.max_length - self.margin)
        if excess <= 0:
            return 0.0
        return -min(1.0, excess / self.margin) if self.margin else -1.0
