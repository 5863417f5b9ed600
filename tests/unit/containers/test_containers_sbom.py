"""The bill of materials of an image, and the search for known vulnerabilities."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]


def script(name: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "containers/cli.py"), name, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_bill_names_every_locked_package_with_its_hashes(tmp_path: Path) -> None:
    result = script("sbom", tmp_path, "envcheck")
    assert result.returncode == 0, result.stderr
    bill = json.loads((tmp_path / "envcheck.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "grpo-toolkit"
    lock = (REPO / "locks/light.txt").read_text()
    hashes = {
        component["name"]: {
            entry["content"]
            for reference in component["externalReferences"]
            for entry in reference.get("hashes", [])
        }
        for component in bill["components"]
    }
    locked = {
        match[1]: set(re.findall(r"sha256:([0-9a-f]{64})", match[2]))
        for match in re.finditer(r"^([a-z0-9-]+)==(.*?)(?=^[a-z]|\Z)", lock, re.M | re.S)
    }
    assert hashes == locked


def test_the_same_lock_gives_the_same_bill(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert script("sbom", tmp_path / folder, "envcheck").returncode == 0
    first, second = (tmp_path / folder / "envcheck.cdx.json" for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_target_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    assert script("sbom", tmp_path, "training").returncode == 2


FAKE = """
import json, os, pathlib, sys
answer = json.loads(os.environ["ANSWER"])
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps(answer))
sys.exit(int(bool([d for d in answer["dependencies"] if d.get("vulns")])))
"""
FOUND = {"id": "PYSEC-1", "fix_versions": ["9.0"], "aliases": [], "description": ""}


@pytest.mark.parametrize(
    ("package", "code", "text"),
    [
        ({"vulns": []}, 0, "1 packages, no known vulnerability"),
        ({"vulns": [FOUND]}, 1, "click 8.5.1: PYSEC-1, fixed in 9.0"),
        # pip-audit exits with 0 here. It found no vulnerability, because it got no answer.
        ({"skip_reason": "not found"}, 4, "no answer for 1 of 1"),
    ],
    ids=["clean", "known", "unanswered"],
)
def test_the_audit_distinguishes_clean_vulnerable_and_unanswered(
    tmp_path: Path, package: dict[str, object], code: int, text: str
) -> None:
    (tmp_path / "pip_audit").mkdir()
    (tmp_path / "pip_audit/__init__.py").touch()
    (tmp_path / "pip_audit/__main__.py").write_text(FAKE)
    answer = {"dependencies": [{"name": "click", "version": "8.5.1", **package}], "fixes": []}
    result = script("audit", "light", PYTHONPATH=str(tmp_path), ANSWER=json.dumps(answer))
    assert result.returncode == code, result.stdout + result.stderr
    assert text in result.stdout


def test_an_audit_of_an_unknown_lock_is_a_usage_error() -> None:
    assert script("audit", "nothing").returncode == 2
