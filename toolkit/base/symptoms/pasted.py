"""Turn a pasted log into text that can be searched: short enough, without colours, prefixes and
line breaks, with the lines of each rank together.
"""

from __future__ import annotations

import re

MAX_TEXT_CHARACTERS = 400_000
"""A longer log is reduced to its error lines and its end before the search."""

_END_CHARACTERS = 60_000
_CONTEXT_CHARACTERS = 300
_MAX_REPEATS = 3
_DIGIT_REMOVAL = dict.fromkeys(map(ord, "0123456789"))
_MAX_HITS = 400  # of one word: as many from the start of the log, and as many from its end
# Parts of the words that mark an error. The first letter of a word is left out, so that an exact
# search finds it in upper and lower case.
_ERROR_WORDS = (
    "rror", "RROR", "GPU", "memory", "pport", "CUDA_", "ailed", "AILED", "annot", "No ", "is not",
    "ould not", "ouldn't", "Active", "ailure", "not found", "undefined symbol", "Xid", "mismatch",
    "oom", "requires", "exitcode", "unsatisfied", "Unable", "illed", "inactive", "Pending", "PCIe",
    "Persistence", "Remap", "nvalid", "compatible", "deprecated", "Detected", "kew", "ancdata",
    "unresolvable", "symbolic link", "arning", "enied", "xception", "remapper", "Insuff",
    "fatal", "atchdog",
)  # fmt: skip

# Prefixes and suffixes that terminals, loggers, launchers and mail add to a line.
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
_PREFIX = re.compile(
    r"[ \t]*(?:(?:>|[│┃|](?=\s)|\[rank\d{1,4}\]:|\([^()\n]{1,80}\bpid=\d{1,9}\)|"
    r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)[ \t]+\d[\d:.,/ -]{4,30}(?:\[[^\]\n]{1,80}\])?|"
    r"\d{4}-\d\d-\d\d[T ][\d:.,]{5,20}Z?(?:[+-][\d:]{2,6})?|"
    r"[\w.-]{1,60}[ \t]+\|(?=\s))[ \t]*){1,8}"
)
_RANK = re.compile(r"\[rank(\d{1,4})\]:|\(([^()\n]{0,80}\bpid=\d{1,9})\)")
_TRAILING_CHARACTERS = " \t\r│┃"  # characters that terminals and loggers add at the end of a line


def condense(text: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Return ``text`` unchanged if it has at most ``max_characters`` characters; else only its
    error lines with some context, and its end.
    """
    if len(text) <= max_characters:
        return text
    text = _without_repeats(text)
    if len(text) <= max_characters:
        return text
    spans = sorted(
        (max(0, position - _CONTEXT_CHARACTERS), position + _CONTEXT_CHARACTERS)
        for position in _find_error_words(text)
    )
    merged: list[list[int]] = []
    for start, stop in [*spans, (len(text) - min(_END_CHARACTERS, max_characters // 4), len(text))]:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    parts = []
    for start, stop in merged:
        first = text.rfind("\n", max(0, start - _CONTEXT_CHARACTERS), start) + 1 or start
        last = text.find("\n", stop, stop + _CONTEXT_CHARACTERS)
        parts.append(text[first : stop if last < 0 else last])
    return _keep_both_ends("\n".join(parts), max_characters)


def _without_repeats(text: str) -> str:
    """Return ``text`` without repeated lines, so that an error between a million progress lines is
    still found. A line is removed if three earlier lines differ from it only in their digits. The
    end of the text is kept.
    """
    body, end = text[:-_END_CHARACTERS], text[-_END_CHARACTERS:]
    seen: dict[str, int] = {}
    lines = []
    keys = body.translate(_DIGIT_REMOVAL).split("\n")
    for line, key in zip(body.split("\n"), keys, strict=True):
        count = seen.get(key, 0)
        if count < _MAX_REPEATS:
            seen[key] = count + 1
            lines.append(line)
    return "\n".join(lines) + end


def _find_error_words(text: str) -> set[int]:
    positions: set[int] = set()
    for word in _ERROR_WORDS:
        first = text.find(word)
        last = text.rfind(word) if first >= 0 else first
        for _ in range(_MAX_HITS):
            if first < 0:
                break
            positions.update((first, last))
            first = text.find(word, first + _CONTEXT_CHARACTERS)
            last = text.rfind(word, 0, max(0, last - _CONTEXT_CHARACTERS))
            last = last if last >= 0 else first
    positions.discard(-1)
    return positions


def _keep_both_ends(text: str, max_characters: int) -> str:
    """Return ``text`` cut to about ``max_characters`` characters: its beginning and its end,
    because these contain the first and the last error of a log.
    """
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    return text[:half] + "\n" + text[-half:]


def group_by_rank(text: str) -> tuple[str, str]:
    """Return two versions of ``text`` in which line prefixes are removed and the lines of each rank
    are next to each other. The first version has a space in place of each line break. The second
    version joins the lines without a space.
    """
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    lines_by_rank: dict[str, list[str]] = {"": []}
    for line in text.split("\n"):
        source, bare = "", line
        if prefix := _PREFIX.match(line):
            rank = _RANK.search(prefix[0])
            source, bare = (rank[1] or rank[2] if rank else ""), line[prefix.end() :]
        lines_by_rank.setdefault(source, []).append(bare.rstrip(_TRAILING_CHARACTERS))
    lines = [line for rank_lines in lines_by_rank.values() for line in rank_lines]
    return " ".join(" ".join(lines).split()), "".join(lines)


def error_lines(text: str, max_lines: int = 80) -> list[str]:
    """The last ``max_lines`` lines that contain a word such as "error" or "failed". If there are no
    such lines, return the last lines of the text.
    """
    lines = [line for line in _ESCAPES.sub("", text).splitlines() if line.strip()]
    matching = [line for line in lines if any(word in line for word in _ERROR_WORDS)]
    return (matching or lines)[-max_lines:]
