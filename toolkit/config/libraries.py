"""Find the values that a library allows for a setting (LoRA ranks, loss types, initializations).
The values are read from the source code of the installed library. If the library is not installed,
a recorded table of the values is used.

The libraries are never imported, because importing vLLM would take seconds and create a GPU
context. A test in tests/contract compares the recorded table with the installed libraries.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class AllowedValues(NamedTuple):
    """The values that a library allows for a setting. ``origin`` says where the values come from:
    ``the vLLM installed here`` or ``vLLM 0.31.0``.
    """

    values: tuple[Any, ...]
    origin: str


# The values that vllm 0.25.1 and 0.31.0, trl 1.16.0 and peft 0.21.2 allow.
RECORDED: dict[str, AllowedValues] = {
    "lora_ranks": AllowedValues((1, 8, 16, 32, 64, 128, 256, 320, 512), "vLLM 0.31.0"),
    "loss_types": AllowedValues(
        ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"), "TRL 1.16.0"
    ),
    "lora_inits": AllowedValues(
        (
            "gaussian", "eva", "olora", "pissa", "pissa_niter_[number of iters]", "corda", "loftq",
            "orthogonal", "mica", "lora_ga",
        ),
        "PEFT 0.21.2",
    ),
}  # fmt: skip

# For each setting: the package, the file in the package, the name of the package in messages, and
# the pattern that finds the values in the text of the file.
_SOURCE_FILES: dict[str, tuple[str, str, str, re.Pattern[str]]] = {
    "lora_ranks": (
        "vllm",
        "config/lora.py",
        "vLLM",
        re.compile(r"^MaxLoRARanks\s*=\s*Literal(\[[^\]]*\])", re.MULTILINE),
    ),
    "loss_types": (
        "trl",
        "trainer/grpo_config.py",
        "TRL",
        re.compile(r"^ +loss_type \(`str`.*?\n(?P<bullets>.*?)\n +mask_truncated", re.M | re.S),
    ),
    "lora_inits": (
        "peft",
        "tuners/lora/config.py",
        "PEFT",
        re.compile(
            r"^    init_lora_weights: \(\s*bool\s*\|\s*Literal(\[.*?\n\s*\])\s*\)", re.M | re.S
        ),
    ),
}


@cache
def allowed_values(setting: str) -> AllowedValues:
    """Return the allowed values of the setting ``setting``: ``lora_ranks``, ``loss_types`` or
    ``lora_inits``.
    """
    return installed_values(setting) or RECORDED[setting]


def installed_values(setting: str) -> AllowedValues | None:
    """Return the allowed values of the setting ``setting`` from the installed library's source
    code. Return None if the library is not installed, or if its source code has an unexpected form.
    """
    package, file, name, pattern = _SOURCE_FILES[setting]
    folder = package_folder(package)
    if folder is None:
        return None
    try:
        match = pattern.search((folder / file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    if match is None:
        return None
    if "bullets" in match.groupdict():
        values = tuple(re.findall(r'^ +- `"(\w+)"`', match["bullets"], re.MULTILINE))
    else:
        values = tuple(ast.literal_eval(match[1]))
    if setting == "lora_inits" and "lora_ga" not in values:
        values = (
            *values,
            "lora_ga",
        )  # PEFT accepts lora_ga, but its annotation does not list that value
    return AllowedValues(values, f"the {name} installed here")


class ModelType(NamedTuple):
    """What the installed transformers supports for one model_type. ``is_known`` says whether
    transformers has the model_type, and ``is_causal`` says whether it has a causal language model
    of that type. Both are None if transformers cannot be read. ``attention_support`` says for each
    attention function whether models of that type support it, and is empty if this is unknown.
    """

    is_known: bool | None = None
    is_causal: bool | None = None
    attention_support: Mapping[str, bool] = {}


@cache
def model_type(name: str) -> ModelType:
    """Return what the installed transformers supports for the model_type ``name``. The keys of
    ``attention_support`` in the result are "sdpa", "flash" and "flex". The facts are read from the
    source code of transformers, in the file layout of version 5.17.
    """
    folder = package_folder("transformers")
    try:
        assert folder is not None
        auto = folder / "models" / "auto"
        types = (auto / "auto_mappings.py").read_text(encoding="utf-8")
        more_types = (auto / "configuration_auto.py").read_text(encoding="utf-8")
        model_classes = (auto / "modeling_auto.py").read_text(encoding="utf-8")
        _, _, causal = model_classes.partition("\nMODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict(")
        assert causal
    except (OSError, UnicodeDecodeError, AssertionError):
        return ModelType()
    known = f'"{name}"' in types or f'"{name}"' in more_types
    return ModelType(
        known, f'("{name}", ' in causal.partition("\n)")[0], _attention_support(folder, name, types)
    )


def _attention_support(folder: Path, name: str, types: str) -> dict[str, bool]:
    """Return a dict that says for each of the attention functions "sdpa", "flash" and "flex"
    whether transformers supports it for the model_type ``name``. The dict is empty if transformers
    has no module for this model_type. ``types`` is the text of auto_mappings.py.
    """
    special_types = types.partition("SPECIAL_MODEL_TYPE_TO_MODULE_NAME")[2]
    match = re.search(rf'\("{re.escape(name)}",\s*"(\w+)"\)', special_types)
    module = match[1] if match else name.replace("-", "_")
    files = (folder / "models" / module).glob("modeling_*.py") if module.isidentifier() else ()
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    kinds = {
        "sdpa": "_supports_sdpa",
        "flash": "_supports_flash_attn",
        "flex": "_supports_flex_attn",
    }
    return {kind: f"{flag} = True" in text for kind, flag in kinds.items()} if text else {}


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it; None if it is not
    installed.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(folders))) if folders else None


LEGAL_RANKS: tuple[int, ...] = RECORDED["lora_ranks"].values
"""The recorded LoRA ranks that vLLM allows for its adapter slots."""


def smallest_rank(rank: int, legal: Iterable[int] = LEGAL_RANKS) -> int | None:
    """Return the smallest rank in ``legal`` that is at least ``rank``; None if every rank in
    ``legal`` is smaller.
    """
    return min((candidate for candidate in legal if candidate >= rank), default=None)
