"""Find the folder of a checkpoint. For a hub id this is the snapshot folder in the local cache.

Engine and trainer read the same folder, so they always read the same revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from toolkit.base.errors import ConfigValueError, InputError, first_line
from toolkit.base.files import check_folder, read_json_object
from toolkit.base.paths import safe_join

ADAPTER_CONFIG = "adapter_config.json"
_DUPLICATE_PATTERNS = ["original/*", "consolidated*"]
_FILE_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in ``folder`` on disk. ``name`` is the hub id or the absolute folder, and is
    used in messages.
    """

    folder: Path
    name: str

    @property
    def is_adapter(self) -> bool:
        """Whether the folder contains a PEFT adapter and no model weights."""
        weights = [*self.folder.glob("model*.safetensors"), *self.folder.glob("pytorch_model*.bin")]
        return self._has_file(ADAPTER_CONFIG) and not weights

    def _has_file(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def read_json(self, file: str) -> dict[str, Any]:
        """Read the JSON object in ``file`` of the folder.

        Raises:
            InputError: the file is missing, unreadable, or not a JSON object.
        """
        return read_json_object(self.folder / file)

    def check_model(self, *, pickle: bool = False) -> None:
        """Check that the folder is a model checkpoint. The weights must be safetensors. If
        ``pickle`` is True, they may also be pickled.

        Raises:
            InputError: the folder has no config.json or no weights, or contains a file that a
                loader might read forever (a pipe, a device).
            ConfigError: the index of the weights names a file outside the folder.
            ConfigValueError: the folder has only pickled weights, and ``pickle`` is False.
        """
        check_folder(self.folder)
        if not self._has_file("config.json"):
            raise InputError(
                "the folder is not a checkpoint: it has neither config.json nor "
                "adapter_config.json",
                where=str(self.folder),
                fix="use a folder that save_pretrained wrote, or a hub id",
            )
        for index in filter(self._has_file, _INDEX_FILES):
            shards = self.read_json(index).get("weight_map")
            for name in set(map(str, shards.values())) if isinstance(shards, dict) else ():
                safe_join(self.folder, name, what=f"a file in {index}", links=True)
        if pickle or any(self.folder.glob("*.safetensors")):
            return
        if any(self.folder.glob("*.bin")):
            raise ConfigValueError(
                "the checkpoint has only pickled weights (*.bin), and a pickle can run code when "
                "it is loaded",
                where=str(self.folder),
                fix="convert the weights to safetensors, or pass use_safetensors=False",
            )
        raise InputError(
            "the checkpoint has no weights (*.safetensors)",
            where=str(self.folder),
            fix="copy the whole checkpoint",
        )


def find_checkpoint(
    name: str, *, revision: str | None = None, token: str | bool | None = None, pickle: bool = False
) -> Checkpoint:
    """Return the checkpoint ``name``. If ``name`` is a hub id, it is downloaded. ``token`` gives
    access to gated repositories.

    Raises:
        InputError: the folder or repository does not exist, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigValueError(
                f"revision={revision!r} can only be used with a hub id, but {name} is a folder",
                where="revision",
                fix="remove revision",
            )
        return Checkpoint(folder.resolve(), str(folder.resolve()))
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        problem = (
            "the path is a file, not a checkpoint's folder"
            if folder.exists()
            else "the folder does not exist"
        )
        raise InputError(problem, where=name, fix="use the folder of a checkpoint, or a hub id")
    try:
        patterns = [*_FILE_PATTERNS, "*.bin"] if pickle else list(_FILE_PATTERNS)
        path = snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=patterns,
            ignore_patterns=_DUPLICATE_PATTERNS,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            "the model is not a folder on this machine, and it could not be loaded from the hub: "
            f"{first_line(error)}",
            where=name,
            fix="check the name and the revision. For a gated model, pass token=... or run `hf auth"
            " login`",
        ) from error
    return Checkpoint(Path(path), name)
