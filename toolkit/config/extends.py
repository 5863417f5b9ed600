"""Check the files that ``extends`` may name: run files below the folder of the run file that is
loaded, or below a folder that the user allows with the environment variable TOOLKIT_EXTENDS_FROM.

A run file from someone else must not show lines of other files (``extends: /etc/shadow``). So the
location of an extended file is checked before it is read, with every link resolved. If that file is
not a run file, only the position of the problem is shown.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.files import kind_fault, os_fault
from toolkit.config.finding import Finding, Fix, Severity, error_finding
from toolkit.config.text_reader import FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Document, Node

VARIABLE = "TOOLKIT_EXTENDS_FROM"
SECTIONS = (
    "model",
    "lora",
    "grpo",
    "reward",
    "dataset",
    "environment",
    "tools",
    "runtime",
    "extends",
    "$schema",
)


def finding_at(rule: str, node: Node, message: str, *fixes: Fix) -> Finding:
    """A finding at the position of ``node``."""
    return error_finding(rule, message, node.source, node.mark, *fixes)


def allowed_folders(root: Path) -> list[Path]:
    """The folders that may contain extended files: the folder of the run file ``root``, and the
    folders that the user's environment allows.
    """
    texts = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [root.resolve(), *(Path(text).expanduser().resolve() for text in texts if text)]


def place_fault(path: Path, node: Node, root: Path) -> Finding | None:
    """The finding that says why the file that ``extends`` names (at ``path``, links resolved) is
    not read; None if it may be read.
    """
    if not any(path.is_relative_to(folder) for folder in allowed_folders(root)):
        return finding_at(
            "DOC016",
            node,
            f"extends: {node.value} is outside of the run file's folder {root.resolve()}",
            Fix(
                "move the file below that folder, or allow the file's folder: "
                f"{VARIABLE}={path.parent}"
            ),
        )
    if path.suffix.lower() not in FORMATS:
        ends = ", ".join(FORMATS)
        return finding_at(
            "DOC017",
            node,
            f"extends: {node.value} is not a run file: its name must end in one of {ends}",
            Fix("extends: base.yaml"),
        )
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return finding_at("DOC011", node, f"extends: {node.value} {os_fault(error)}")
    if not stat.S_ISREG(mode):
        return finding_at("DOC011", node, f"extends: {node.value} {kind_fault(mode)}")
    return None


def content_fault(base: Document, node: Node) -> Finding | None:
    """The finding that says why the text of the extended file is not a run file, without showing
    any of the text; None if it is one.
    """
    broken = [found for found in base.findings if found.severity is Severity.ERROR]
    if not base.whole:
        mark = broken[0].mark if broken else None
        where = f" (line {mark.line}, column {mark.column})" if mark else ""
        what = f"cannot be read as a mapping of keys{where}"
    elif base.root.value and not any(section in base.root.value for section in SECTIONS):
        what = f"has no section of a run file ({', '.join(SECTIONS[:-2])})"
    else:
        return None
    return finding_at(
        "DOC017",
        node,
        f"extends: {node.value} is not a run file: it {what}",
        Fix("name a run file; `envcheck validate` on that file shows what is wrong in it"),
    )


def real_path(node: Node) -> Path | None:
    """The path that ``extends`` names, with every link resolved; None for a loop of links."""
    try:
        return Path(node.source.folder, node.value).resolve(strict=False)
    except (OSError, RuntimeError, ValueError):
        return None


def check_chain(path: Path, chain: Sequence[Path], most: int) -> str | None:
    """The chain of files as a text, if a file extends itself or the chain is too long; else
    None.
    """
    if path in [seen.resolve() for seen in chain] or len(chain) >= most:
        return " -> ".join(seen.name for seen in [*chain, path])
    return None
