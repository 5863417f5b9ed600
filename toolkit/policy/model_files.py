"""Find a checkpoint: a folder, or a hub id, of which one snapshot folder is used.

Engine and trainer read the same folder, so they cannot read two revisions of one name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from toolkit.base.errors import ConfigValueError, InputError, first_line
from toolkit.base.files import check_folder, read_object
from toolkit.base.paths import safe_join

ADAPTER_CONFIG = "adapter_config.json"
_DOUBLES = ["original/*", "consolidated*"]
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in ``folder`` on disk. ``name`` is for messages: the hub id, or the absolute
    folder.
    """

    folder: Path
    name: str

    @property
    def is_adapter(self) -> bool:
        """Whether the folder is that of a PEFT adapter, which has no model weights."""
        weights = [*self.folder.glob("model*.safetensors"), *self.folder.glob("pytorch_model*.bin")]
        return self._has(ADAPTER_CONFIG) and not weights

    def _has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def read_json(self, file: str) -> dict[str, Any]:
        """The JSON object in ``file`` of the folder.

        Raises:
            InputError: the file is missing, unreadable, or not a JSON object.
        """
        return read_object(self.folder / file)

    def check_model(self, *, pickle: bool = False) -> None:
        """Raise an error if the folder is not a model checkpoint; weights must be safetensors
        unless ``pickle``.

        Raises:
            InputError: no config.json, no weights, or a file that a loader cannot read in bounded
                time (a pipe, a device).
            ConfigError: the index of weights names a file outside the folder.
            ConfigValueError: the folder has only pickled weights, and ``pickle`` is False.
        """
        check_folder(self.folder)
        if not self._has("config.json"):
            raise InputError(
                "is not a checkpoint: it has neither config.json nor adapter_config.json",
                where=str(self.folder),
                fix="name a folder that save_pretrained wrote, or a hub id",
            )
        for index in filter(self._has, _INDEXES):
            shards = self.read_json(index).get("weight_map")
            for name in set(map(str, shards.values())) if isinstance(shards, dict) else ():
                safe_join(self.folder, name, what=f"a file in {index}", links=True)
        if pickle or any(self.folder.glob("*.safetensors")):
            return
        if any(self.folder.glob("*.bin")):
            raise ConfigValueError(
                "has only pickled weights (*.bin), and a pickle can run code",
                where=str(self.folder),
                fix="convert it to safetensors, or pass use_safetensors=False explicitly",
            )
        raise InputError(
            "has no weights (*.safetensors)",
            where=str(self.folder),
            fix="copy the whole checkpoint",
        )


def find_checkpoint(
    name: str, *, revision: str | None = None, token: str | bool | None = None, pickle: bool = False
) -> Checkpoint:
    """The checkpoint called ``name``, downloaded if it is a hub id. ``token`` gives access to gated
    repositories.

    Raises:
        InputError: the folder or repository does not exist, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigValueError(
                f"revision={revision!r} is only for hub ids, but {name} is a folder",
                where="revision",
                fix="remove revision",
            )
        return Checkpoint(folder.resolve(), str(folder.resolve()))
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        kind = "is a file, not a checkpoint's folder" if folder.exists() else "does not exist"
        raise InputError(kind, where=name, fix="name a checkpoint's folder, or a hub id")
    try:
        patterns = [*_FILES, "*.bin"] if pickle else list(_FILES)
        path = snapshot_download(
            name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=_DOUBLES
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            (
                "is not a folder on this machine, and it could not be loaded from the hub: "
                f"{first_line(error)}"
            ),
            where=name,
            fix="check the name and revision; a gated model needs token=... or `hf auth login`",
        ) from error
    return Checkpoint(Path(path), name)
