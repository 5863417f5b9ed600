"""A model is found in the hub cache as huggingface_hub finds it, and never outside the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from toolkit.base.hub_cache import cached_model

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_model_folder(tmp_path: Path) -> Path:
    """The folder of a model in a hub cache. HF_HOME must be ``tmp_path``."""
    cached_model_folder = tmp_path / "hub/models--org--name"
    (cached_model_folder / "refs/pr").mkdir(parents=True)
    (cached_model_folder / "refs/main").write_text(COMMIT)
    (cached_model_folder / "refs/pr/1").write_text(f"{COMMIT}\n")
    (cached_model_folder / "snapshots" / COMMIT).mkdir(parents=True)
    return cached_model_folder


@pytest.mark.parametrize("revision", [None, "main", "pr/1", COMMIT])
def test_a_model_is_found_by_branch_and_by_commit(
    cached_model_folder: Path, tmp_path: Path, revision: str | None
) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    assert cached_model("org/name", revision, environ) == cached_model_folder / "snapshots" / COMMIT


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
def test_a_model_that_is_not_cached_is_not_found(
    cached_model_folder: Path, tmp_path: Path, name: str, revision: str | None
) -> None:
    assert cached_model(name, revision, {"HF_HOME": str(tmp_path)}) is None


def test_a_reference_outside_the_cache_is_not_followed(
    cached_model_folder: Path, tmp_path: Path
) -> None:
    (cached_model_folder / "refs/main").write_text("../../../etc")
    assert cached_model("org/name", None, {"HF_HOME": str(tmp_path)}) is None


def test_environment_variables_set_the_cache_folder(
    cached_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        assert found.resolve() == cached_model_folder / "snapshots" / COMMIT
