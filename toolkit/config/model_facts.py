"""Read the facts about a model that the rules check. The facts come from the model's config.json
and from the names of its weights. torch is not needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from toolkit.base import files
from toolkit.base.errors import InputError
from toolkit.base.hub_cache import cached_model
from toolkit.config.lora_targets import get_text_config, has_experts
from toolkit.config.run_paths import path_exists, resolve_path
from toolkit.config.supported_features import head_dim

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.document import Node

ADAPTER_CONFIG = "adapter_config.json"
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class ModelFacts:
    """A model's folder, the content of its config.json, and facts that are derived from this
    content and from the names of the weights.
    """

    folder: Path
    config: dict[str, Any]

    @property
    def source(self) -> str:
        """The path of the model's config.json."""
        return str(self.folder / "config.json")

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The settings of the language model in config.json."""
        return dict(get_text_config(self.config))

    def positive_integer(self, *names: str) -> int | None:
        """Look up the keys ``names`` in the language model's settings in config.json, and return
        the first value that is a positive integer. Return None if there is no such value.
        """
        for name in names:
            value = self.text_config.get(name)
            if type(value) is int and value > 0:
                return value
        return None

    @property
    def max_length(self) -> int | None:
        """The maximum length of a sequence in tokens, with the rope scaling of config.json applied;
        None if it is unknown.
        """
        length = self.positive_integer(*_LENGTH_KEYS)
        scaling = self.text_config.get("rope_scaling") or self.text_config.get("rope_parameters")
        if length is None or not isinstance(scaling, dict):
            return length
        kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
        if kind in ("linear", "dynamic", "yarn") and isinstance(factor, (int, float)):
            original = scaling.get("original_max_position_embeddings")
            base = original if type(original) is int else length
            return max(length, int(base * factor)) if 1 <= factor < 1e6 else length
        return length

    @property
    def longrope_original_length(self) -> int | None:
        """The length in tokens above which LongRoPE uses its factors for long sequences; None if
        the model does not use LongRoPE.
        """
        scaling = self.text_config.get("rope_parameters") or self.text_config.get("rope_scaling")
        if not isinstance(scaling, dict):
            return None
        if "longrope" not in (scaling.get("rope_type"), scaling.get("type")):
            return None
        original = scaling.get("original_max_position_embeddings")
        return (
            original
            if type(original) is int
            else self.positive_integer("original_max_position_embeddings")
        )

    @property
    def max_length_key(self) -> str:
        """The name of the key in config.json from which ``max_length`` is computed."""
        return next(
            (name for name in _LENGTH_KEYS if type(self.text_config.get(name)) is int),
            _LENGTH_KEYS[0],
        )

    @property
    def attention_heads(self) -> int | None:
        """The number of attention heads."""
        return self.positive_integer("num_attention_heads", "n_head")

    @property
    def is_mixture_of_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return has_experts(self.text_config)

    @property
    def has_tied_head(self) -> bool | None:
        """Whether lm_head and the embedding share one weight; None if neither config.json nor the
        names of the weights show this.
        """
        setting = self.config.get(
            "tie_word_embeddings", self.text_config.get("tie_word_embeddings")
        )
        if isinstance(setting, bool):
            return setting
        return None if self.weight_modules is None else "lm_head" not in self.weight_modules

    @cached_property
    def weight_modules(self) -> frozenset[str] | None:
        """The full names of the modules that have a weight; None if the model's weight files are
        not on this machine or cannot be read.
        """
        names = _weight_names(self.folder)
        if names is None:
            return None
        return frozenset(name.rpartition(".")[0] for name in names if "." in name)


def read_model(node: Node, revision: str | None) -> ModelFacts | None:
    """Return the facts of a model; None if the model is not on this machine. ``node`` is the value
    of ``model.model_name``, which is a folder or a hub id. A hub id is looked up in the hub cache.
    """
    folder = resolve_path(node.value, node)
    if not path_exists(f"{folder}/config.json"):
        cached = cached_model(node.value, revision, os.environ)
        if cached is None:
            return None
        folder = cached
    config = read_json(folder / "config.json")
    return ModelFacts(folder, config) if isinstance(config, dict) else None


def folder_fault(folder: Path) -> str | None:
    """Return a text that says why a model's folder cannot be loaded; None if it can. The reason is
    that the folder cannot be listed, or that it contains a file on which the loader could wait
    forever (such as a named pipe).
    """
    try:
        for name, fault in files.irregular_files(folder):
            return f"{name} {fault}"
    except InputError as error:
        return error.message
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter and not a model."""
    return path_exists(folder / ADAPTER_CONFIG) and not path_exists(folder / "config.json")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if the file is missing, too large or not JSON."""
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


GPU_BLOCK_TOKENS, CPU_BLOCK_TOKENS = 16, 128  # tokens per KV block (vllm/platforms/{cuda,cpu}.py)
ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
OTHER_CACHE_PREFIXES = (
    "mamba", "linear_", "conv_L_cache", "ssm", "hybrid_override", "full_attn_idxs",
    "attn_type_list", "cla_", "multi_query", "num_kv_heads",
)  # fmt: skip
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def min_cache_bytes(
    text_config: Mapping[str, Any],
    *,
    tokens: int,
    element_bytes: int,
    block_tokens: int,
    gpus: int = 1,
) -> int | None:
    """Return a lower bound of the size of the KV cache per GPU in bytes. The bound is the size of
    the KV cache for one sequence of ``tokens`` tokens, plus the block that vLLM keeps empty. Return
    None if a layer stores other state than its own keys and values.

    ``text_config`` contains the settings of the language model in config.json. ``gpus`` is the
    number of GPUs over which the model is split. Each GPU stores its part of the KV heads, at least
    one head. The bound assumes that all layers have the sliding window if one layer has it. So the
    exact size may be much larger. ``sizing.kv_bytes`` computes the exact size for every model type.
    """
    layers, heads = text_config.get("num_hidden_layers"), text_config.get("num_attention_heads")
    counts = (layers, text_config.get("num_key_value_heads", heads), head_dim(text_config))
    if not all(type(count) is int and count > 0 for count in counts):
        return None
    layer_types = text_config.get("layer_types") or ()
    if (
        set(layer_types) - ATTENTION_LAYERS
        or text_config.get("num_kv_shared_layers")
        or _has_other_caches(text_config)
    ):
        return None
    window = text_config.get("sliding_window")
    cached_tokens = min(tokens, window) if type(window) is int and window > 0 else tokens
    blocks = -(-cached_tokens // block_tokens) + 1
    layers, kv_heads, size = (count for count in counts if count is not None)
    elements_per_token = 2 * layers * -(-kv_heads // gpus) * size
    return elements_per_token * element_bytes * block_tokens * blocks


def _has_other_caches(text_config: Mapping[str, Any]) -> bool:
    """Whether a key in ``text_config``, the settings of the language model, shows that the formula
    of ``min_cache_bytes`` does not apply. Such a key means one of three things: layers store other
    state (Mamba, linear attention), layers share a cache, or the number of KV heads has another
    name.
    """
    return any(name.startswith(OTHER_CACHE_PREFIXES) for name in text_config)
