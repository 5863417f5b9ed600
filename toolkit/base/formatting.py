"""Format bytes, durations and counts in readable units, and make unprintable characters visible.

In all modules, a variable that contains a quantity has its unit at the end of its name: ``_bytes``,
``_gib``, ``_tokens``, ``_s``.
"""

from __future__ import annotations

import re

# Control characters except tab and line feed (they control a terminal), zero-width and direction
# characters (they hide or reverse text), and code points that are not characters.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff\ufff9-\uffff]"
)


def escape_unprintable(text: str) -> str:
    """Return ``text`` with each unprintable character replaced by its code point, such as
    ``[U+202E]``. Line feeds and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(count: float) -> str:
    """Format a number of bytes in binary units: ``1.50 GiB``, ``12.0 MiB``, ``17 B``."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size >= GIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.1f} KiB"
    return f"{sign}{size:.0f} B"


def format_parameters(count: int) -> str:
    """Format the number of parameters of a model or an adapter: ``8.030 B``, ``0.46 M``."""
    return f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: ``1 warning``, ``2 warnings``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_duration(seconds: float) -> str:
    """Format seconds as ``42 s``, ``3 min 07 s`` or ``2 h 05 min``."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    minutes, seconds_left = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {seconds_left:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
