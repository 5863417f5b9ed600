"""Parse report.html as a browser does, and check the properties that every report must have."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from toolkit.train.report import page, write_report

if TYPE_CHECKING:
    from pathlib import Path

ALLOWED_TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "div", "h1", "h2", "h3",
    "p", "span", "b", "i", "small", "ul", "li", "figure", "figcaption", "svg", "defs", "clippath",
    "rect", "g", "path", "line", "circle", "text", "section", "table", "tr", "th", "td", "code",
    "pre", "details", "summary", "footer", "script",
}  # fmt: skip
ALLOWED_ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "viewbox", "role", "aria-label",
    "data-points", "id", "x", "y", "width", "height", "clip-path", "d", "x1", "x2", "y1", "y2",
    "cx", "cy", "r", "rx", "preserveaspectratio",
}  # fmt: skip
VOID = {"meta", "rect", "path", "line", "circle"}


class Page(HTMLParser):
    """The elements, attributes and texts of the page, as a browser parses them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def render_report(folder: Path) -> tuple[str, Page]:
    """Write the report of the run in ``folder`` and check the properties that every report must
    have. Return its source and the parsed page.
    """
    path = write_report(folder)
    source = path.read_text()
    parsed = Page(source)
    assert parsed.open == []
    assert set(parsed.tags) <= ALLOWED_TAGS
    assert {name for name, _ in parsed.attributes} <= ALLOWED_ATTRIBUTES
    assert parsed.tags.count("script") == parsed.tags.count("style") == 1
    assert parsed.text["script"] == (page._FOLDER / "page.js").read_text()
    assert "nan" not in re.findall(r'[ "](nan|inf)[ "L]', source)
    return source, parsed
