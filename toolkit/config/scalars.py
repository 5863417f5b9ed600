"""Read a plain (unquoted) YAML scalar as YAML 1.2 does, and as YAML 1.1 does, for comparison.

Run files use the core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2). Many readers, such as
PyYAML, still follow YAML 1.1 (yaml.org/type). The two versions read some scalars differently, which
surprises users: ``5e-6`` is text in 1.1 and a number in 1.2.
"""

from __future__ import annotations

import math
import re
from typing import Any

from toolkit.config.source import MAX_DIGITS

_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_INT_12 = re.compile(r"[-+]?[0-9]+")
_OCT_12 = re.compile(r"0o[0-7]+")
_HEX_12 = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT_12 = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")
_CONSTANTS_12: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip

_CONSTANTS_11 = dict(_CONSTANTS_12)
for _spelling, _meaning in {
    "yes": True,
    "on": True,
    "y": True,
    "no": False,
    "off": False,
    "n": False,
}.items():
    _CONSTANTS_11 |= {
        _spelling: _meaning,
        _spelling.capitalize(): _meaning,
        _spelling.upper(): _meaning,
    }
_FLOAT_11 = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?)"
)
_INT_11 = re.compile(r"[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)")
_BASE_60 = re.compile(
    r"[-+]?(?:[1-9][0-9_]*(?::[0-5]?[0-9])+|[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*)"
)
_TIME_11 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)"
    r"[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
    r"(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::?[0-9]{2})?))?"
)


MAX_INT64 = 2**63 - 1
TOO_LARGE_INT = 2**64  # stands for an integer that has too many digits to be converted
_SHOWN_DIGITS = 30


def beyond_64_bits(value: object) -> bool:
    """Whether ``value`` is an integer that does not fit into 64 bits (signed)."""
    return type(value) is int and not -MAX_INT64 - 1 <= value <= MAX_INT64


def too_large_message(text: str) -> str:
    """Return the message for an integer that does not fit into 64 bits. ``text`` is the integer as
    it is written in the file.
    """
    shown = text if len(text) <= _SHOWN_DIGITS else f"{text[:_SHOWN_DIGITS]}..."
    return (
        f"{shown} ({len(text)} characters) does not fit into 64 bits: an integer must be from "
        f"{-MAX_INT64 - 1} to {MAX_INT64}"
    )


def is_long_integer(text: str) -> bool:
    """Whether a plain scalar is an integer with more than MAX_DIGITS digits. Such an integer is not
    converted to a number.
    """
    return len(text) > MAX_DIGITS and _INTEGER.fullmatch(text) is not None


def read_core(text: str) -> Any:
    """Return the value of a plain scalar in the core schema of YAML 1.2. The type of the value is
    None, bool, int, float or str.
    """
    if text in _CONSTANTS_12:
        return _CONSTANTS_12[text]
    first = text[0]
    if not (first.isdigit() or first in "+-.") or len(text) > MAX_DIGITS or not text.isascii():
        return text
    if _INT_12.fullmatch(text):
        return int(text)
    if _FLOAT_12.fullmatch(text):
        return float(text)
    if _OCT_12.fullmatch(text):
        return int(text[2:], 8)
    if _HEX_12.fullmatch(text):
        return int(text, 16)
    if _INF.fullmatch(text):
        return -math.inf if first == "-" else math.inf
    if _NAN.fullmatch(text):
        return math.nan
    return text


def read_legacy(text: str) -> tuple[str, Any]:
    """Return how YAML 1.1 reads a plain scalar, as a pair: a description for messages (such as
    ``the boolean true``), and the value. The value of a date is None.
    """
    if text in _CONSTANTS_11:
        value = _CONSTANTS_11[text]
        return ("null" if value is None else "the boolean " + str(value).lower()), value
    if len(text) > MAX_DIGITS or not text.isascii():
        return "text", text
    if _INT_11.fullmatch(text):
        return _legacy_int(text)
    if _FLOAT_11.fullmatch(text):
        digits = text.replace("_", "")
        return ("a float", float(digits)) if digits.strip("+-.") else ("text", text)
    if _INF.fullmatch(text) or _NAN.fullmatch(text):
        return "a float", read_core(text)
    if _BASE_60.fullmatch(text):
        value = _base_60(text)
        return f"the base-60 number {value:g}", value
    if _TIME_11.fullmatch(text):
        return "a date", None
    return "text", text


def _legacy_int(text: str) -> tuple[str, Any]:
    sign = -1 if text[0] == "-" else 1
    digits = text.lstrip("+-").replace("_", "")
    if digits.startswith("0b"):
        return _describe_integer(sign, digits[2:], 2, "the binary number")
    if digits.startswith("0x"):
        return _describe_integer(sign, digits[2:], 16, "the number")
    if len(digits) > 1 and digits[0] == "0":
        return _describe_integer(sign, digits[1:], 8, "the octal number")
    return _describe_integer(sign, digits, 10, "the number")


def _describe_integer(sign: int, digits: str, base: int, name: str) -> tuple[str, Any]:
    if not digits:
        return "text", digits
    value = sign * int(digits, base)
    return f"{name} {value}", value


def _base_60(text: str) -> float:
    sign = -1 if text[0] == "-" else 1
    total = 0.0
    for part in text.lstrip("+-").replace("_", "").split(":"):
        total = total * 60 + float(part)
    return sign * total


def legacy_reading(text: str, core_value: Any) -> str | None:
    """Return a description of the value that YAML 1.1 reads for ``text``; None if YAML 1.1 and YAML
    1.2 read the same value. ``core_value`` is the value in YAML 1.2.
    """
    if isinstance(core_value, str):
        first = text[0]
        if not (first.isdigit() or first in "+-.=<") and text not in _CONSTANTS_11:
            return None
    elif core_value is None or isinstance(core_value, bool):
        return None
    description, legacy_value = read_legacy(text)
    if type(legacy_value) is type(core_value) and (
        legacy_value == core_value or legacy_value != legacy_value
    ):
        return None
    return description


def plain_spelling(value: object) -> str:
    """Return the text of a scalar in a form that YAML 1.1 and YAML 1.2 read in the same way."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        mantissa, exponent, power = text.partition("e")
        if exponent:
            mantissa += "" if "." in mantissa else ".0"
            return f"{mantissa}e{int(power):+d}"
        return text
    if isinstance(value, str):
        return quote_if_needed(value)
    return str(value)


_SAFE_TEXT = re.compile(r"[A-Za-z_./][A-Za-z0-9_./ -]*(?<! )")


def quote_if_needed(text: str) -> str:
    """Return ``text`` without quotes if YAML 1.1 and 1.2 both read it as text, otherwise in double
    quotes.
    """
    if (
        _SAFE_TEXT.fullmatch(text)
        and isinstance(read_core(text), str)
        and read_legacy(text)[1] == text
    ):
        return text
    escaped = (
        text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    )
    return f'"{escaped}"'
