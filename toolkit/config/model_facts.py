"""Facts of a model that rules need, read from config.json and the names of its weights, without
torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from toolkit.base import files
from toolkit.base.errors import InputError
from toolkit.base.hub import cached_model
from toolkit.config.lora_targets import has_experts, text_part
from toolkit.config.run_paths import exists, resolve

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.document import Node

ADAPTER_CONFIG = "adapter_config.json"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class ModelFacts:
    """A model's config.json and its folder."""

    folder: Path
    config: dict[str, Any]

    @property
    def source(self) -> str:
        """The file that the facts come from."""
        return str(self.folder / "config.json")

    @cached_property
    def text(self) -> dict[str, Any]:
        """The part that describes the language model."""
        return dict(text_part(self.config))

    def whole(self, *names: str) -> int | None:
        """The first of these keys that is a positive integer."""
        for name in names:
            value = self.text.get(name)
            if type(value) is int and value > 0:
                return value
        return None

    @property
    def max_length(self) -> int | None:
        """The longest sequence in tokens, with the config's own rope scaling."""
        length = self.whole(*_LENGTHS)
        scaling = self.text.get("rope_scaling") or self.text.get("rope_parameters")
        if length is None or not isinstance(scaling, dict):
            return length
        kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
        if kind in ("linear", "dynamic", "yarn") and isinstance(factor, (int, float)):
            original = scaling.get("original_max_position_embeddings")
            base = original if type(original) is int else length
            return max(length, int(base * factor)) if 1 <= factor < 1e6 else length
        return length

    @property
    def longrope_original(self) -> int | None:
        """The length in tokens above which LongRoPE uses its long factors; None without
        LongRoPE.
        """
        scaling = self.text.get("rope_parameters") or self.text.get("rope_scaling")
        if not isinstance(scaling, dict):
            return None
        if "longrope" not in (scaling.get("rope_type"), scaling.get("type")):
            return None
        original = scaling.get("original_max_position_embeddings")
        return original if type(original) is int else self.whole("original_max_position_embeddings")

    @property
    def max_length_from(self) -> str:
        """The key that gives ``max_length``."""
        return next((name for name in _LENGTHS if type(self.text.get(name)) is int), _LENGTHS[0])

    @property
    def heads(self) -> int | None:
        """Attention heads."""
        return self.whole("num_attention_heads", "n_head")

    @property
    def experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return has_experts(self.text)

    @property
    def tied(self) -> bool | None:
        """Whether lm_head is tied to the embedding; None if neither the config nor the weights show
        it.
        """
        said = self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        if isinstance(said, bool):
            return said
        return None if self.modules is None else "lm_head" not in self.modules

    @cached_property
    def modules(self) -> frozenset[str] | None:
        """Full names of the modules that own a weight; None if the weights are not available."""
        names = _weight_names(self.folder)
        if names is None:
            return None
        return frozenset(name.rpartition(".")[0] for name in names if "." in name)


def read_model(node: Node, revision: str | None) -> ModelFacts | None:
    """The facts of the model that ``node`` names: a folder, or a snapshot in the hub cache."""
    folder = resolve(node.value, node)
    if not exists(f"{folder}/config.json"):
        cached = cached_model(node.value, revision, os.environ)
        if cached is None:
            return None
        folder = cached
    config = read_json(folder / "config.json")
    return ModelFacts(folder, config) if isinstance(config, dict) else None


def folder_fault(folder: Path) -> str | None:
    """Why a loader could not read a model's folder in bounded time, in words; None if it could."""
    try:
        for name, fault in files.irregular_files(folder):
            return f"{name} {fault}"
    except InputError as error:
        return error.message
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return exists(folder / ADAPTER_CONFIG) and not exists(folder / "config.json")


def read_json(path: Path) -> Any:
    """A JSON file of limited size; None if it is missing or not JSON."""
    try:
        return files.read_json(path)
    except InputError:
        return None


def _weight_names(folder: Path) -> list[str] | None:
    index = read_json(folder / "model.safetensors.index.json")
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        return list(index["weight_map"])
    path = folder / "model.safetensors"
    try:
        with files.open_regular(path) as (descriptor, size):
            length = int.from_bytes(files.read_exactly(descriptor, 8, path), "little")
            if length > min(size, files.MAX_JSON_BYTES):
                return None
            header = files.parse_json(files.read_exactly(descriptor, length, path), path)
    except InputError:
        return None
    if not isinstance(header, dict):
        return None
    return [name for name in header if name != "__metadata__"]
