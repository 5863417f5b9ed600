"""Finding a checkpoint: folders, hub ids, adapters, and errors of the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from toolkit.base.errors import InputError
from toolkit.policy import model_files
from toolkit.policy.model_files import find_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_a_hub_id_gives_the_folder_of_one_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download_arguments: dict[str, Any] = {}

    def download(name: str, **arguments: Any) -> str:
        download_arguments.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(model_files, "snapshot_download", download)
    checkpoint = find_checkpoint("org/model", revision="abc", token="hf_x")
    assert (checkpoint.name, checkpoint.folder) == ("org/model", tmp_path)
    assert (
        download_arguments["name"],
        download_arguments["revision"],
        download_arguments["token"],
    ) == ("org/model", "abc", "hf_x")
    assert "*.safetensors" in download_arguments["allow_patterns"]
    assert "*.bin" not in download_arguments["allow_patterns"]
    find_checkpoint("org/model", pickle=True)
    assert "*.bin" in download_arguments["allow_patterns"]


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline"), HFValidationError("bad id"), OSError("reset")]
)
def test_the_error_of_the_hub_is_reported_without_the_token(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, **arguments: Any) -> str:
        raise error

    monkeypatch.setattr(model_files, "snapshot_download", download)
    with pytest.raises(InputError, match="it could not be loaded from the hub") as caught:
        find_checkpoint("org/model", token="hf_secret")
    assert str(error) in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_an_adapter_is_recognized_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path)).is_adapter
    (tmp_path / "config.json").write_text("{}")  # some repositories also have the base's config
    assert find_checkpoint(str(tmp_path)).is_adapter
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not find_checkpoint(str(tmp_path)).is_adapter


def test_a_relative_folder_is_stored_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter records the path of its base, which must be valid from any working directory."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("model").name == str(tmp_path / "model")
