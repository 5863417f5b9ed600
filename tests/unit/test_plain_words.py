"""Texts are plain English: strings, comments, docstrings, documents and schemas contain no idioms
of a list.

``IDIOMS`` is the list: a pattern, and what to write instead.
"""

from __future__ import annotations

import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "examples").rglob("*.md"))),
)
PENDING: tuple[str, ...] = ()
"""Files whose texts are not yet plain. Remove an entry when its texts are plain; add none."""

_NOUNS = (
    "adapter|file|folder|integer|JSON|key|list|mapping|multiple|name|norm|number|object|path|rank|"
    "regular|run|text|valid|value|way|word"
)
_EACH = "card|file|head|layer|line|parameter|process|prompt|rank|run|sequence|step|token"
IDIOMS = {
    r"hangs? on(?! in\b)": "depends on",
    r"data sets?\b": "dataset",
    rf"(?<!there )(?:is|are) no (?:{_NOUNS})s?": "is not a, must be a",
    r"(?:that|which|what) (?:is|are) none": "that does not exist, an invalid one",
    r"gives? back|gave back": "frees, returns",
    r"goes? on": "continues, resumes",
    r"(?:is|are|was|were) told|tells? of|told of": "is reported, reports",
    r"stands(?! for\b)|stand in": "is, is in",
    r"as it stands": "unchanged",
    r"without a word|in silence": "silently",
    r"of ours": "of the toolkit",
    r"at hand": "available, on this machine",
    r"by hand": "yourself",
    r"nothing was said": "is not set",
    r"ways? out\b": "fix",
    r"mend(?:ed|s)?": "fix, correct",
    r"(?:a )?slip of": "misspelling of",
    r"out of reach": "not available",
    rf"(?:a|an|one|{_EACH}|bytes|nats|tokens|completions) a (?:{_EACH})": "per",
    r"passed over|pass(?:es)? over(?= (?:one|what|a|by|in)\b)": "ignores, skips",
    r"leans? on": "uses",
    r"keeps? quiet": "reports nothing",
    r"is wanted|are wanted": "must be",
    r"looked into": "read, checked",
    r"of today": "current",
    r"goes without|go without": "excludes, cannot be used with",
    r"in words of (?:its|their) own": "differently",
}
_PATTERNS = [
    (re.compile(rf"\b(?:{found})(?!\w)", re.IGNORECASE), IDIOMS[found]) for found in IDIOMS
]


def texts(path: Path) -> list[tuple[int, str]]:
    """(line number, text) for each text that a person reads in a file. In a module, these are
    comments and strings, and strings that Python joins are one text. In other files, it is each
    line.
    """
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        lines = content.split("\n")
        return [(number, line) for number, line in enumerate(lines, 1)]
    found: list[tuple[int, str]] = []
    joined = False
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type not in (tokenize.STRING, tokenize.COMMENT):
            joined = joined and token.type == tokenize.NL
            continue
        text = re.sub(r"^[rRbBfFuU]*[\"']+|[\"']+$|^#:? ?", "", token.string)
        if joined and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
        else:
            found.append((token.start[0], text))
        joined = True
    return found


def idioms(text: str) -> list[str]:
    """Each idiom in a text, with what to write instead."""
    plain = " ".join(text.split())
    return [
        f"{match[0]!r} (instead: {instead})"
        for pattern, instead in _PATTERNS
        for match in pattern.finditer(plain)
    ]


@cache
def files() -> tuple[Path, ...]:
    """Every file whose texts a user or a reader of the code sees."""
    found = [*(ROOT / "toolkit").rglob("*.py"), *(ROOT / "schemas").glob("*.*")]
    return tuple(sorted((*found, *(ROOT / name for name in DOCUMENTS))))


@pytest.mark.parametrize(
    "part",
    ["base", "cli", "config", "engine", "gpu", "policy", "sizing", "train", "schemas", "documents"],
)
def test_texts_are_plain(part: str) -> None:
    inside = {"schemas": "schemas/", "documents": ""}.get(part, f"toolkit/{part}/")
    wrong = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        is_in_part = name in DOCUMENTS if part == "documents" else name.startswith(inside)
        if not is_in_part or name.startswith(PENDING):
            continue
        for line, text in texts(path):
            wrong += [f"{name}:{line}: {one}" for one in idioms(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("the loss would hang on the micro-batch", 1),
        ("8 is no multiple of 3", 1),
        ("the run goes on without it", 1),
        ("3 bytes a parameter", 1),
        ("a reward that hangs", 0),
        ("what the letter stands for", 0),
        ("None if there is none", 0),
    ],
)
def test_the_word_list_finds_idioms_and_leaves_plain_words(text: str, count: int) -> None:
    assert len(idioms(text)) == count


def test_strings_that_python_joins_are_one_text(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('NAME = (\n    "it goes "\n    "on"\n)\n', encoding="utf-8")
    assert [idioms(text) != [] for _, text in texts(module)] == [True]
