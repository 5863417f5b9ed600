"""For the tests of ``envcheck size``: the installed command, and folders of real models that have
a config.json but no weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ENVCHECK = Path(sys.executable).with_name("envcheck")
SHAPES = {
    shape["id"]: shape
    for shape in json.loads(
        (Path(__file__).parents[1] / "fixtures" / "sizing" / "shapes.json").read_text()
    )
}
EIGHT_B, ONE_B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B-Instruct"


def run_envcheck(
    *arguments: object,
    code: int = 0,
    cwd: Path | None = None,
    stdin: str | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the installed command and assert its exit code."""
    result = subprocess.run(
        [str(ENVCHECK), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        input=stdin,
        env={**os.environ, "COLUMNS": "110", "NO_COLOR": "1", **environment},
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def make_model(parent: Path, name: str) -> Path:
    """Make a folder with the config.json of a model of shapes.json."""
    folder = parent / name.rpartition("/")[2]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]["config"]))
    return folder
