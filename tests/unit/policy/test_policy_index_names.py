"""A weight index may only name files in its own folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from toolkit.base.errors import ConfigError
from toolkit.policy.model_files import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def _checkpoint_with_index(
    folder: Path, name: str, index: str = "model.safetensors.index.json"
) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "some.safetensors").write_bytes(b"")
    (folder / index).write_text(json.dumps({"weight_map": {"a": "some.safetensors", "b": name}}))
    return Checkpoint(folder, str(folder))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../x"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(
    tmp_path: Path, name: str, index: str
) -> None:
    with pytest.raises(ConfigError, match=f"a file in {index} leads outside its folder"):
        _checkpoint_with_index(tmp_path / "model", name, index).check_model()


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    checkpoint = _checkpoint_with_index(tmp_path / "model", "more.safetensors")
    (tmp_path / "model" / "more.safetensors").symlink_to(tmp_path / "blob")
    checkpoint.check_model()
    assert (tmp_path / "model" / "more.safetensors").is_symlink()
