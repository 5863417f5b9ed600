"""The run folder, and resuming from it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from toolkit.config.document import Node
from toolkit.config.rules.violation import Fault, rule
from toolkit.config.run_paths import exists, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.rules.run import Run

_RESUME = "runtime.resume"
_OUTPUT = "runtime.output_dir"


@rule(
    "RUN001",
    f"{_OUTPUT} {_RESUME}",
    example="runtime:\n  output_dir: runs/old  # not empty\n  resume: never",
    fix="resume: auto, or another output_dir",
)
def output_is_free(run: Run) -> Iterator[Fault]:
    """With resume: never, output_dir is empty.

    A new run would overwrite the old one. With resume: auto the run continues where the old one
    stopped.
    """
    if run.value(_RESUME) != "never":
        return
    folder = _folder(run)
    if _something_in(folder):
        yield Fault(
            _OUTPUT,
            f"{folder} is not empty, and resume is never",
            notes=(run.operand(_RESUME),),
            fixes=(run.to(_RESUME, "auto"),),
            related=(_RESUME,),
        )


@rule(
    "RUN002",
    f"{_RESUME} {_OUTPUT}",
    example="runtime:\n  output_dir: runs/new  # empty\n  resume: must",
    fix="resume: auto",
)
def something_to_resume(run: Run) -> Iterator[Fault]:
    """With resume: must or a checkpoint's folder, there is a checkpoint to resume from."""
    resume = run.value(_RESUME)
    if resume in ("auto", "never"):
        return
    if resume == "must":
        folder = _folder(run)
        if not any(one.startswith("checkpoint-") for one in _names(folder)):
            yield Fault(
                _RESUME,
                f"there is no checkpoint in {folder} to resume from",
                notes=(run.operand(_OUTPUT),),
                fixes=(run.to(_RESUME, "auto"),),
            )
        return
    node = run.node(_RESUME)
    assert isinstance(node, Node)
    path = resolve(resume, node)
    if not path.is_dir():
        yield Fault(
            _RESUME,
            f"{resume} is neither auto, never or must, nor a checkpoint folder",
            fixes=(run.to(_RESUME, "auto"),),
        )


def _folder(run: Run) -> Path:
    text, node = str(run.value(_OUTPUT)), run.node(_OUTPUT)
    return resolve(text, node if node is not None else run.document.root)


def _something_in(folder: Path) -> bool:
    return exists(folder) and (not folder.is_dir() or bool(_names(folder)))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
