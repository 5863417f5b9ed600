"""Check base files. The base file of a run file is the file that its key ``extends`` names. A base
file must itself be a run file. It must be in or below the folder of the loaded run file, or a
folder that the environment variable TOOLKIT_EXTENDS_FROM lists.

Without these checks, a run file from someone else could name a private file (``extends:
/etc/shadow``), and an error message would print lines of that private file. The location of a base
file is therefore checked before the file is read, after all symbolic links in its path were
resolved. If a base file is not a run file, the error message contains the position of the problem,
but no text of the base file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.files import file_type_fault, open_fault
from toolkit.config.finding import Finding, Fix, Severity, error_finding
from toolkit.config.text_reader import FORMAT_BY_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Document, Node

FOLDERS_VARIABLE = "TOOLKIT_EXTENDS_FROM"
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
    return error_finding(rule, message, node.source, node.position, *fixes)


def allowed_folders(root: Path) -> list[Path]:
    """Return the folders that may contain base files. These are the folder of the run file
    (``root``), and the folders that the environment variable TOOLKIT_EXTENDS_FROM lists.
    """
    texts = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    return [root.resolve(), *(Path(text).expanduser().resolve() for text in texts if text)]


def location_fault(path: Path, node: Node, root: Path) -> Finding | None:
    """Return a finding if a base file is outside the allowed folders or does not have the name of a
    run file; None if it may be read. ``path`` is the path of the base file with symbolic links
    resolved. ``node`` is the value of ``extends``. ``root`` is the folder of the run file.
    """
    if not any(path.is_relative_to(folder) for folder in allowed_folders(root)):
        return finding_at(
            "DOC016",
            node,
            f"extends: {node.value} is outside the run file's folder {root.resolve()}",
            Fix(
                f"move the base file into that folder, or set {FOLDERS_VARIABLE}={path.parent} to "
                "allow its current folder"
            ),
        )
    if path.suffix.lower() not in FORMAT_BY_SUFFIX:
        ends = ", ".join(FORMAT_BY_SUFFIX)
        return finding_at(
            "DOC017",
            node,
            f"extends: {node.value} is not a run file: its name must end in one of {ends}",
            Fix(f"set `extends` to a file whose name ends in {ends}, for example base.yaml"),
        )
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return finding_at("DOC011", node, f"extends: {node.value} {open_fault(error)}")
    if not stat.S_ISREG(mode):
        return finding_at("DOC011", node, f"extends: {node.value} {file_type_fault(mode)}")
    return None


def content_fault(base: Document, node: Node) -> Finding | None:
    """Return a finding if the base file is not a run file; None if it is. ``base`` is the document
    of the base file. The finding does not contain any text of the base file.
    """
    errors = [finding for finding in base.findings if finding.severity is Severity.ERROR]
    if not base.is_complete:
        mark = errors[0].position if errors else None
        location = f" (line {mark.line}, column {mark.column})" if mark else ""
        problem = f"cannot be read as a mapping of keys{location}"
    elif base.root.value and not any(section in base.root.value for section in SECTIONS):
        problem = f"has none of the sections of a run file ({', '.join(SECTIONS[:-2])})"
    else:
        return None
    return finding_at(
        "DOC017",
        node,
        f"extends: {node.value} is not a run file: it {problem}",
        Fix(
            "set `extends` to a run file, or run `envcheck validate` on the base file and "
            "correct its errors"
        ),
    )


def resolve_base_path(node: Node) -> Path | None:
    """Return the path that ``extends`` names, with symbolic links resolved; None if the symbolic
    links form a loop.
    """
    try:
        return Path(node.source.folder, node.value).resolve(strict=False)
    except (OSError, RuntimeError, ValueError):
        return None


def chain_fault(path: Path, chain: Sequence[Path], max_length: int) -> str | None:
    """Check whether the base file ``path`` may be loaded. ``chain`` lists the files that were
    loaded so far: each file is the base file of the previous one. Return None if ``path`` may be
    loaded. Return the names of the files as text if ``path`` is already in ``chain``, or if
    ``chain`` has ``max_length`` or more files.
    """
    if path in [loaded.resolve() for loaded in chain] or len(chain) >= max_length:
        return " -> ".join(loaded.name for loaded in [*chain, path])
    return None
