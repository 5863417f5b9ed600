"""Check the file that ``extends`` names. It must be a run file below the folder of the loaded run
file, or below a folder that the environment variable TOOLKIT_EXTENDS_FROM lists.

These checks prevent that a run file from someone else makes error messages print lines of private
files (``extends: /etc/shadow``). The location of an extended file is therefore checked before the
file is read, after resolving every symbolic link. If the file is not a run file, the message
contains only the position of the problem, not the text.
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
    """Return an error finding at the position of ``node``."""
    return error_finding(rule, message, node.source, node.mark, *fixes)


def allowed_folders(root: Path) -> list[Path]:
    """Return the folders that may contain extended files. These are the folder of the run file
    (``root``), and the folders that the environment variable lists.
    """
    texts = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [root.resolve(), *(Path(text).expanduser().resolve() for text in texts if text)]


def place_fault(path: Path, node: Node, root: Path) -> Finding | None:
    """Return a finding if the file that ``extends`` names must not be read; None if it may be read.
    ``path`` is its path with symbolic links resolved, ``node`` is the value of ``extends``, and
    ``root`` is the folder of the run file.
    """
    if not any(path.is_relative_to(folder) for folder in allowed_folders(root)):
        return finding_at(
            "DOC016",
            node,
            f"extends: {node.value} is outside the run file's folder {root.resolve()}",
            Fix(
                "move the file below that folder, or allow its folder by setting "
                f"{VARIABLE}={path.parent}"
            ),
        )
    if path.suffix.lower() not in FORMATS:
        ends = ", ".join(FORMATS)
        return finding_at(
            "DOC017",
            node,
            f"extends: {node.value} is not a run file: its name must end in one of {ends}",
            Fix(f"name a file that ends in {ends}, for example extends: base.yaml"),
        )
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return finding_at("DOC011", node, f"extends: {node.value} {os_fault(error)}")
    if not stat.S_ISREG(mode):
        return finding_at("DOC011", node, f"extends: {node.value} {kind_fault(mode)}")
    return None


def content_fault(base: Document, node: Node) -> Finding | None:
    """Return a finding if the extended file (``base``) is not a run file; None if it is. The
    finding does not contain any text of the file.
    """
    broken = [found for found in base.findings if found.severity is Severity.ERROR]
    if not base.whole:
        mark = broken[0].mark if broken else None
        where = f" (line {mark.line}, column {mark.column})" if mark else ""
        what = f"cannot be read as a mapping of keys{where}"
    elif base.root.value and not any(section in base.root.value for section in SECTIONS):
        what = f"has none of the sections of a run file ({', '.join(SECTIONS[:-2])})"
    else:
        return None
    return finding_at(
        "DOC017",
        node,
        f"extends: {node.value} is not a run file: it {what}",
        Fix("name a run file, or run `envcheck validate` on the named file to see what is wrong"),
    )


def real_path(node: Node) -> Path | None:
    """Return the path that ``extends`` names, with symbolic links resolved; None if the links form
    a loop.
    """
    try:
        return Path(node.source.folder, node.value).resolve(strict=False)
    except (OSError, RuntimeError, ValueError):
        return None


def check_chain(path: Path, chain: Sequence[Path], most: int) -> str | None:
    """Check the chain of files that extend one another. Return it as text if ``path`` is already in
    it, or if it has ``most`` or more files; else return None.
    """
    if path in [seen.resolve() for seen in chain] or len(chain) >= most:
        return " -> ".join(seen.name for seen in [*chain, path])
    return None
