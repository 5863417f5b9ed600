"""The pre-commit hooks, and the modeline for yaml-language-server in every valid fixture."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
VALID = ROOT / "tests" / "fixtures" / "valid"
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_runs_as_pre_commit_runs_it(hook: dict[str, str], tmp_path: Path) -> None:
    """pre-commit appends the file names to the entry and reads the exit code."""
    good, bad = tmp_path / "run.yaml", tmp_path / "run-2.yaml"
    good.write_text(
        (VALID / "KEY002.yaml").read_text("utf-8").replace("../", f"{ROOT}/tests/fixtures/"),
        "utf-8",
    )
    bad.write_text(good.read_text("utf-8") + "lora: {r: 600}\n", "utf-8")
    command, *options = shlex.split(hook["entry"])
    codes = [
        subprocess.run(
            [BIN / command, *options, *files], capture_output=True, check=False
        ).returncode
        for files in ([good], [good, bad])
    ]
    assert codes == ([0, 0] if "--fix" in options else [0, 1])
    assert re.search(hook["files"], "configs/run-7b.yaml")
    assert not re.search(hook["files"], "compose.yaml")


def test_the_modeline_of_every_example_names_the_schema() -> None:
    examples = sorted(VALID.glob("*.yaml"))
    assert len(examples) > 60
    for path in examples:
        first = path.read_text("utf-8-sig").splitlines()[0]
        found = re.fullmatch(r"# yaml-language-server: \$schema=(.+)", first)
        assert found, path.name
        assert (path.parent / found[1]).resolve() == ROOT / "schemas" / "run.schema.json"
