"""The locks name only the public index, have a hash for every package, and match pyproject.toml."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

REPO = Path(__file__).resolve().parents[3]
LOCKS = sorted((REPO / "locks").glob("*.txt"))
PUBLIC = {"https://pypi.org", "https://files.pythonhosted.org"}
# The CPU build of torch for development. It has no hashes on purpose, and no image uses it.
WITHOUT_HASHES = {"cpu-torch.txt"}


def test_no_lock_names_a_host_other_than_the_public_index() -> None:
    for path in [REPO / "uv.lock", *LOCKS]:
        hosts = set(re.findall(r"(?:https?|ftp|file)://[^/\"\s]*", path.read_text()))
        assert hosts <= PUBLIC, f"{path.name} names {sorted(hosts - PUBLIC)}"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_no_lock_carries_options_of_an_index(path: Path) -> None:
    assert not re.search(
        r"^(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b",
        path.read_text(),
        re.MULTILINE,
    )


@pytest.mark.parametrize(
    "path", [path for path in LOCKS if path.name not in WITHOUT_HASHES], ids=lambda path: path.name
)
def test_every_package_has_a_hash(path: Path) -> None:
    entries = re.split(r"^(?=[A-Za-z0-9])", path.read_text(), flags=re.MULTILINE)
    packages = [entry for entry in entries if re.match(r"[A-Za-z0-9._-]+==", entry)]
    assert packages
    bare = [entry.split()[0] for entry in packages if "--hash=sha256:" not in entry]
    assert bare == []


def copy_of_the_project(folder: Path) -> Path:
    """A copy of the files that lock.sh reads, which a test can change."""
    for name in ("pyproject.toml", "uv.lock", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    for name in ("locks", "containers"):
        shutil.copytree(REPO / name, folder / name)
    (folder / "toolkit/base").mkdir(parents=True)
    shutil.copy(REPO / "toolkit/base/version.py", folder / "toolkit/base")
    (folder / "schemas").mkdir()
    (folder / ".venv").symlink_to(REPO / ".venv")
    return folder


def run_lock_check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / "containers/cli.py"), "lock", "--check"],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_locks_match_the_project(tmp_path: Path) -> None:
    result = run_lock_check(copy_of_the_project(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "the locks match pyproject.toml" in result.stderr


def test_a_changed_requirement_is_reported(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path)
    text = (project / "pyproject.toml").read_text()
    assert '"click>=8.2"' in text
    (project / "pyproject.toml").write_text(text.replace('"click>=8.2"', '"click>=99"'))
    result = run_lock_check(project)
    assert result.returncode == 1
    assert "uv.lock does not match pyproject.toml" in result.stderr
    assert "just lock" in result.stderr


def test_an_edited_lock_file_is_reported_with_its_difference(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path)
    lock = project / "locks/light.txt"
    lock.write_text(re.sub(r"^click==\S+", "click==8.2.0", lock.read_text(), flags=re.MULTILINE))
    result = run_lock_check(project)
    assert result.returncode == 1
    assert "locks/light.txt differs from what uv.lock generates" in result.stderr
    assert "click==8.2.0" in result.stderr


def test_a_mirror_in_a_lock_is_reported(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path)
    lock = project / "uv.lock"
    lock.write_text(
        lock.read_text().replace("https://files.pythonhosted.org", "https://mirror.example", 3)
    )
    result = run_lock_check(project)
    assert result.returncode == 1
    assert "other hosts than the public index: https://mirror.example" in result.stderr


def tags_of(python: tuple[int, int], glibc: int) -> set[Tag]:
    """The wheel tags that CPython on x86-64 Linux with glibc 2.``glibc`` accepts."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    compatible = compatible_tags(python, f"cp{python[0]}{python[1]}", platforms)
    return {*cpython_tags(python, platforms=platforms), *compatible}


@pytest.mark.parametrize(
    ("lock", "python", "glibc"),
    [
        ("light.txt", (3, 11), 36),  # python:3.11-slim-bookworm
        ("cpu.txt", (3, 11), 36),
        ("cu130.txt", (3, 12), 39),  # Ubuntu 24.04
    ],
)
def test_every_package_has_a_wheel_for_the_python_of_its_base(
    lock: str, python: tuple[int, int], glibc: int
) -> None:
    """An image build compiles no package. A package that has only an sdist would end the build
    after half an hour.
    """
    wheels: dict[tuple[str, str], list[str]] = {}
    for package in tomllib.loads((REPO / "uv.lock").read_text())["package"]:
        names = [wheel["url"].rpartition("/")[2] for wheel in package.get("wheels", [])]
        wheels[(package["name"], package.get("version", ""))] = names
    accepted = tags_of(python, glibc)
    environment = {"python_full_version": f"{python[0]}.{python[1]}.0"}
    entries = re.findall(
        r"^([a-z0-9._-]+)==([^\s;\\]+)(?: ; ([^\\\n]+))?", (REPO / "locks" / lock).read_text(), re.M
    )
    assert len(entries) > 3
    without = [
        f"{name} {version}"
        for name, version, marker in entries
        if not marker or Marker(marker).evaluate(environment)
        if not any(
            parse_wheel_filename(unquote(wheel))[3] & accepted for wheel in wheels[(name, version)]
        )
    ]
    assert without == []
