"""Untrusted names cannot lead outside their folder. Written files have at most the mode 0644, and
folders 0755.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from toolkit.base import paths
from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a\0b",
        "C:\\x",
        "..\\x",
        "a\\..\\..\\x",
        "\\\\host\\share",
        "//host/x",
    ],
)
def test_a_name_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="outside its folder"):
        paths.safe_join(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "a..b", "..a", "./a", "a/./b"])
def test_a_name_inside_is_joined(tmp_path: Path, name: str) -> None:
    assert paths.safe_join(tmp_path, name) == tmp_path / name


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "in").symlink_to(root)
    with pytest.raises(ConfigError, match="link that leads outside"):
        paths.safe_join(root, "out/secret")
    assert paths.safe_join(root, "in/file") == root / "in/file"
    assert paths.safe_join(root, "out/blob", links=True) == root / "out/blob"
    with pytest.raises(ConfigError, match="outside its folder"):
        paths.safe_join(root, "../out", links=True)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"),
    [(0o000, 0o644, 0o755), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)],
)
def test_modes_under_any_umask(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    old = os.umask(umask)
    try:
        folder = paths.make_folder(tmp_path / "a" / "b")
        paths.write_file(folder / "file", "text")
        paths.append_line(folder / "lines", "one")
    finally:
        os.umask(old)
    assert [mode_of(tmp_path / "a"), mode_of(folder)] == [folder_mode, folder_mode]
    assert [mode_of(folder / "file"), mode_of(folder / "lines")] == [file_mode, file_mode]


@pytest.mark.parametrize(("umask", "expected"), [("000", "022"), ("077", "077"), ("002", "022")])
def test_tighten_umask_never_adds_a_permission(umask: str, expected: str) -> None:
    code = (
        "import os; from toolkit.base.paths import tighten_umask\n"
        f"os.umask(0o{umask}); old = tighten_umask(); print(f'{{old:03o}} {{os.umask(0):03o}}')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [umask, expected]


def test_write_file_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "f"
    paths.write_file(path, "old")
    with path.open() as reader:
        paths.write_file(path, b"new", durable=True)
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_write_file_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        paths.write_file(target, "x")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_rewritten_file_keeps_its_mode_and_its_link(tmp_path: Path, mode: int) -> None:
    file, link = tmp_path / "run.yaml", tmp_path / "link.yaml"
    file.write_text("old")
    file.chmod(mode)
    link.symlink_to(file)
    paths.rewrite_file(link, "new")
    assert link.is_symlink()
    assert (file.read_text(), mode_of(file)) == ("new", mode)


def test_append_line_never_mixes_lines(tmp_path: Path) -> None:
    for text in ("one", "two\n", ""):
        paths.append_line(tmp_path / "f", text)
    assert (tmp_path / "f").read_text() == "one\ntwo\n\n"


def test_a_special_file_is_never_replaced(tmp_path: Path) -> None:
    """Root could run ``envcheck record /dev/null``. The test uses a pipe instead of the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="not a regular file"):
            paths.write_named_file(tmp_path / name, "x")
    with pytest.raises(OSError, match="not a regular file"):
        paths.write_file(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_write_named_file_keeps_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    paths.write_named_file(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"
    paths.write_named_file(tmp_path / "new", "x")
    assert (tmp_path / "new").read_text() == "x"
