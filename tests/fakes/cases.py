"""Fixture nodes: a base (a complete recorded node) with changes, and the expected verdict of each
check.

A case has ``change`` (dotted path -> value; ``*`` means every item of a list; as the last part of a
path, it means every reading of a row, except the state), ``quirks`` of the fake NVML, ``arguments``
of the command, ``run`` (overrides of a small run file) and ``expect``: exit codes and every verdict
that is not ok.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAKES = Path(__file__).parent
FOLDER = Path(__file__).parents[1] / "fixtures" / "snapshots"
RUN = {
    "model": {"model_name": "example/absent-model"},
    "dataset": {"path": "train.jsonl", "prompt": "question", "answer": "answer"},
    "reward": {"functions": [{"name": "numeric_match"}]},
}


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    node: dict[str, Any]
    expect: dict[str, Any]
    quirks: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    run: dict[str, Any] | None = None
    changed: tuple[str, ...] = ()

    def run_file(self, folder: Path) -> Path | None:
        """Write the run file of the case and a data file next to it. None if the case has none."""
        if self.run is None:
            return None
        (folder / "train.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
        data = {key: {**RUN.get(key, {}), **self.run.get(key, {})} for key in {*RUN, *self.run}}
        data["dataset"]["path"] = str(folder / "train.jsonl")
        path = folder / "run.json"
        path.write_text(json.dumps(data))
        return path

    def envcheck(
        self, folder: Path, *arguments: str, fake: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the installed command on the node of the case, or with ``fake`` False on this one."""
        with self.start(folder, *arguments, fake=fake) as process:
            try:
                stdout, stderr = process.communicate(timeout=60)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def start(self, folder: Path, *arguments: str, fake: bool = True) -> subprocess.Popen[str]:
        """Start the same command, but do not wait for its end."""
        file = folder / "node.json"
        file.write_text(json.dumps({"node": self.node, "quirks": self.quirks}))
        environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environ |= {"COLUMNS": "100", "HF_HOME": str(folder / "hf")}
        if fake:
            environ |= self.node["environment"]
            environ |= {"PYTHONPATH": str(FAKES), "TOOLKIT_TEST_NODE": str(file)}
        command = [str(Path(sys.executable).parent / "envcheck"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environ, stdout=pipe, stderr=pipe, text=True, cwd=folder
        )


def names() -> list[str]:
    """The name of every case."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def base(name: str) -> dict[str, Any]:
    """A new copy of a complete recorded node."""
    data: dict[str, Any] = json.loads((FOLDER / "bases" / f"{name}.json").read_text())
    return data


def load(name: str) -> Case:
    """A case. Its changes are applied to the node."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    node = base(data["base"])
    for path, value in data.get("change", {}).items():
        change(node, path.split("."), value)
    return Case(
        name,
        data["title"],
        node,
        data["expect"],
        data.get("quirks", {}),
        tuple(data.get("arguments", ())),
        data.get("run"),
        tuple(data.get("change", {})),
    )


def change(parent: Any, path: list[str], value: Any) -> None:
    """Set the value at a dotted path below ``parent``."""
    head, *rest = path
    if head == "*" and isinstance(parent, list):
        for item in parent:
            change(item, rest, value)
    elif head == "*":
        for key in [key for key in parent if key not in ("index", "slices", "state")]:
            if value is None:
                del parent[key]
            else:
                parent[key] = value
    elif rest:
        change(parent[int(head)] if isinstance(parent, list) else parent[head], rest, value)
    elif isinstance(parent, list):
        parent[int(head)] = value
    else:
        parent[head] = value
