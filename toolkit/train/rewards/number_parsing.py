"""Parse numbers as people and models write them. The results are exact fractions, and parsing takes
bounded time.

The supported forms are ``42``, ``-1,234.50``, ``$5``, ``3/4``, ``1 3/4``, ``1.2e3``,
``1.2 x 10^3``, ``50%``, GSM8K's ``#### 42``, and LaTeX ``\\boxed{\\frac{3}{4}}``. Units after a
number are ignored. A comma that does not separate thousands ends a number (``3,5`` is 3 and 5).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

# The maximum number of digits and the largest exponent. Larger numbers are ignored, because a
# number such as 1e999999999 would fill the memory.
MAX_DIGITS = 300

_DECIMAL_PATTERN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER_PATTERN = re.compile(
    rf"""
    (?<![A-Za-z_\d.])                    # not inside a word or another number
    (?P<sign>(?<![\w)\]}}])[-+](?=[$€£¥]?[\d.]))?     # after an operand (7-5) this is no sign
    (?:[$€£¥]\s?(?P<inner>-)?)?
    (?:(?P<whole>\d{{1,9}})[ ]+(?=\d{{1,9}}/\d))?     # the 1 of 1 3/4
    (?P<value>{_DECIMAL_PATTERN})
    (?:
      [eE](?P<exponent>[-+]?\d{{1,9}})(?!\w|\.\d)
      | \s?(?:x|\u00d7|\*|\\times|\\cdot)\s?10(?:\^|\*\*)\{{?(?P<power>[-+]?\d{{1,9}})\}}?
    )?
    (?:\s?/\s?(?P<below>{_DECIMAL_PATTERN}))?
    (?P<percent>\s?(?:%|percent\b))?
    """,
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*([^{}]{1,60}?)\s*\}\s*\{\s*([^{}]{1,60}?)\s*\}|(\d)(\d))"
)
_SPACE_IN_NUMBER = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")


class Number(NamedTuple):
    """An exact number. If a percent sign follows, ``is_percent`` is True (``50%``: value 50)."""

    value: Fraction
    is_percent: bool = False


def numbers_in(text: str) -> list[Number]:
    """Return every number in ``text``, in order. Numbers that are too long and divisions by 0 are
    skipped. This function never raises an exception.
    """
    numbers = (_parse_match(match) for match in _NUMBER_PATTERN.finditer(_normalize_spelling(text)))
    return [number for number in numbers if number is not None]


def _last_number(text: str) -> Number | None:
    """The last of ``numbers_in(text)``, or None. Only this number is converted, because a text can
    have many numbers.
    """
    for match in reversed(list(_NUMBER_PATTERN.finditer(_normalize_spelling(text)))):
        number = _parse_match(match)
        if number is not None:
            return number
    return None


def answer_in(text: str) -> Number | None:
    """The number that ``text`` states as its answer.

    It is the first number after the last ``####`` (GSM8K, arXiv 2110.14168), else the last number
    in the last ``\\boxed{}``, else the last number in the text. None if there is no number.
    """
    if "####" in text:
        numbers_after_marker = numbers_in(text.rsplit("####", 1)[1])
        if numbers_after_marker:
            return numbers_after_marker[0]
    boxed = last_boxed(text)
    boxed_number = _last_number(boxed) if boxed is not None else None
    return _last_number(text) if boxed_number is None else boxed_number


def to_number(value: object) -> Number | None:
    """The answer of a dataset row (an int, a float, or a text) as a number. None if the answer
    contains no number.
    """
    if isinstance(value, bool) or value is None:
        return None
    return answer_in(value if isinstance(value, str) else repr(value))


def is_same_number(guess: Number, gold: Number, tolerance: float | None = None) -> bool:
    """Whether two numbers are equal. ``gold`` is the number in the dataset.

    The numbers count as equal if they differ by at most ``tolerance`` * max(1, |gold|). If
    ``tolerance`` is None, two integers must be exactly equal, and for other numbers 1e-12 is used
    as the tolerance (the rounding of a double).

    If only one of the two numbers has a percent sign, its value may be read with or without the
    percent sign: 50% equals 0.5 and also 50.
    """
    guesses = (
        [guess.value]
        if guess.is_percent == gold.is_percent or gold.is_percent
        else _possible_values(guess)
    )
    golds = (
        [gold.value]
        if guess.is_percent == gold.is_percent or guess.is_percent
        else _possible_values(gold)
    )
    return any(_within_tolerance(a, b, tolerance) for a in guesses for b in golds)


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}``, which may contain balanced braces. None if there is
    no closed ``\\boxed``.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _possible_values(number: Number) -> list[Fraction]:
    return [number.value, number.value / 100]


def _within_tolerance(a: Fraction, b: Fraction, tolerance: float | None) -> bool:
    if tolerance is None:
        if a.denominator == b.denominator == 1:
            return a == b
        tolerance = 1e-12
    return abs(a - b) <= Fraction(tolerance) * max(Fraction(1), abs(b))


_SPELLINGS = (
    ("\u2212", "-"),
    ("{,}", ","),
    ("\\!", ""),
    ("\\,", ""),
    ("\\$", "$"),
    ("\\%", "%"),
)


def _normalize_spelling(text: str) -> str:
    """``text`` with typographic and LaTeX spellings of numbers replaced by plain spellings."""
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    return _LATEX_FRACTION.sub(_normalize_fraction, _SPACE_IN_NUMBER.sub("", text))


def _normalize_fraction(match: re.Match[str]) -> str:
    follows_digit = match.string[: match.start()][-1:].isdigit()  # 1\frac{3}{4}
    return f"{' ' if follows_digit else ''}{match[1] or match[3]}/{match[2] or match[4]} "


def _parse_match(match: re.Match[str]) -> Number | None:
    value = _parse_decimal(match["value"])
    denominator = _parse_decimal(match["below"]) if match["below"] else Fraction(1)
    exponent = int(match["exponent"] or match["power"] or 0)
    if value is None or not denominator or abs(exponent) > MAX_DIGITS:
        return None
    value = value * Fraction(10) ** exponent / denominator + int(match["whole"] or 0)
    is_negative = "-" in (match["sign"], match["inner"])
    return Number(-value if is_negative else value, match["percent"] is not None)


def _parse_decimal(text: str) -> Fraction | None:
    digits = text.replace(",", "")
    return Fraction(digits) if len(digits) <= MAX_DIGITS else None
