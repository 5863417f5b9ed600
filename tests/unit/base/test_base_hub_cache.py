"""A model of the hub is found in the cache as huggingface_hub finds it, and never outside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from toolkit.base.hub_cache import cached_model

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model's folder in a cache below HF_HOME."""
    folder = tmp_path / "hub/models--org--name"
    (folder / "refs/pr").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "refs/pr/1").write_text(f"{COMMIT}\n")
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("revision", [None, "main", "pr/1", COMMIT])
def test_by_branch_and_by_commit(folder: Path, tmp_path: Path, revision: str | None) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    assert cached_model("org/name", revision, environ) == folder / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("org/name", "../../x"),
        ("org/name", "/etc/hostname"),
        ("org/name", "dev"),
        ("org/other", None),
        ("../x", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_what_is_not_there(folder: Path, tmp_path: Path, name: str, revision: str | None) -> None:
    assert cached_model(name, revision, {"HF_HOME": str(tmp_path)}) is None


def test_a_reference_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    (folder / "refs/main").write_text("../../../etc")
    assert cached_model("org/name", None, {"HF_HOME": str(tmp_path)}) is None


def test_the_variables_that_say_where(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/huggingface").symlink_to(tmp_path)
    for environ in (
        {},
        {"XDG_CACHE_HOME": ""},
        {"XDG_CACHE_HOME": str(tmp_path / ".cache")},
        {"HF_HOME": "~"},
        {"HF_HUB_CACHE": "~/hub", "HF_HOME": "/nonexistent"},
    ):
        found = cached_model("org/name", None, environ)
        assert found is not None, environ
        assert found.resolve() == folder / "snapshots" / COMMIT
