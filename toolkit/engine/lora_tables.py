"""Choose the table of tuned configurations of vLLM's LoRA kernels for a GPU.

vLLM reads ``CARD_SHRINK.json``, ``CARD_EXPAND_TRUE.json`` and ``CARD_EXPAND_FALSE.json`` from the
folder in VLLM_TUNED_CONFIG_FOLDER. CARD is the device's name (``lora/ops/triton_ops/utils.py``,
0.25.1). A table of the toolkit is one file, which ``engine.lora_tune`` writes. It has the contents
of these three files, and the version of vLLM that was measured. Another vLLM version may use the
values differently, so the table is then ignored.

The package contains tables in ``tuned/``, one for each class of cards. The environment variable
TOOLKIT_LORA_TABLE has the path of another table, or is ``off``. If the user has set
VLLM_TUNED_CONFIG_FOLDER, vLLM reads that folder and no table of the toolkit is used.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.base.errors import InputError, ToolkitWarning
from toolkit.base.files import read_json

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
TABLE_VARIABLE = "TOOLKIT_LORA_TABLE"
NO_TABLE = "off"
SHIPPED_TABLES = Path(__file__).parent / "tuned"
TUNED_BATCH_SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
"""The batch sizes (in tokens) whose configurations are measured."""
PREFILL_BATCH_SIZES = (1024, 2048, 8192)
"""Larger batch sizes of a table. They keep vLLM's own configuration. A batch of another size uses
the configuration of the nearest size in the table.
"""
OPS = ("SHRINK", "EXPAND_TRUE", "EXPAND_FALSE")
CARD_CLASSES = (
    (r"\bGH200\b|\bH200\b", ("h200", "h100")),
    (r"\bH100\b|\bH800\b|\bH20\b", ("h100", "h200")),
    (r"\bA100\b|\bA800\b", ("a100",)),
)
"""Pairs of a pattern for the device's name and the names of its tables, best first. H100 and H200
can use each other's tables, because they have the same multiprocessors.
"""


@dataclass(frozen=True, slots=True, order=True)
class LayerShape:
    """The shape of the LoRA matrices of one fused layer. The parts of the fused layer are called
    slices. Each slice has its own matrix A (rank, ``in_features``) and its own matrix B (number of
    rows, rank). ``rows`` has the number of rows of B for each slice.
    """

    rows: tuple[int, ...]
    in_features: int
    rank: int

    @property
    def slices(self) -> int:
        """The number of parts of the fused layer."""
        return len(self.rows)

    @property
    def out_features(self) -> int:
        """The number of rows of the largest LoRA matrix B. When vLLM looks up the configuration of
        an expand kernel, it uses this number as the hidden size.
        """
        return max(self.rows)


_warned: set[str] = set()
_created_folders: dict[str, str] = {}


def table_names_for(card: str) -> tuple[str, ...]:
    """Return the names of the kernel tables in ``tuned/`` that can be used for a GPU. ``card`` is
    the name of the GPU. The best table is first.
    """
    return next((names for pattern, names in CARD_CLASSES if re.search(pattern, card)), ())


def find_table(card: str, shipped: Path = SHIPPED_TABLES) -> Path | None:
    """Return the path of the table for the device with the name ``card``. If the environment
    variable TOOLKIT_LORA_TABLE is set, its value is the path. Otherwise this is the path of a table
    that this package contains. Returns None if there is no table, or the variable is ``off``.
    """
    configured = os.environ.get(TABLE_VARIABLE)
    if configured:
        return None if configured == NO_TABLE else Path(configured).expanduser()
    paths = (shipped / f"{name}.json" for name in table_names_for(card))
    return next((path for path in paths if path.is_file()), None)


def user_folder() -> str | None:
    """Return the folder of tables that the user has set in VLLM_TUNED_CONFIG_FOLDER. Return None if
    the variable is not set, or if ``use_table`` has set it.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    return None if folder in _created_folders.values() else folder


def use_table(card: str, vllm_version: str, shipped: Path = SHIPPED_TABLES) -> Path | None:
    """Make vLLM read the table for ``card``. Returns the folder that vLLM reads, or None if there
    is no table. Warns once if a table is ignored.

    Raises:
        InputError: the file in TOOLKIT_LORA_TABLE is not a table.
    """
    if user_folder() is not None:
        return None
    os.environ.pop(FOLDER_VARIABLE, None)
    path = find_table(card, shipped)
    if path is None:
        return None
    table = read_table(path)
    if table["vllm"] != vllm_version:
        _warn_once(
            f"{path} has LoRA kernel configurations for vLLM {table['vllm']}, but the installed "
            f"version is vLLM {vllm_version}. So this table is ignored. Run `toolkit tune` to "
            "create a table for the installed version"
        )
        return None
    folder = _created_folders.get(f"{path}|{card}")
    if folder is None or not Path(folder).is_dir():
        folder = _created_folders[f"{path}|{card}"] = str(write_vllm_files(table, card))
    os.environ[FOLDER_VARIABLE] = folder
    return Path(folder)


def read_table(path: Path) -> dict[str, Any]:
    """Read a table that ``write_table`` wrote.

    Raises:
        InputError: the file cannot be read, or a key is missing.
    """
    table = read_json(path)
    has_version = isinstance(table, dict) and isinstance(table.get("vllm"), str)
    if not has_version or not all(isinstance(table.get(op), dict) and table[op] for op in OPS):
        raise InputError(
            "the file is not a table of LoRA kernel configurations. Such a table has the keys "
            f"vllm, {', '.join(OPS)}",
            where=str(path),
            fix="create a table with `toolkit tune`, or set the environment variable "
            f"{TABLE_VARIABLE}=off",
        )
    checked_table: dict[str, Any] = table
    return checked_table


def write_table(table: dict[str, Any], path: Path) -> None:
    """Write the table atomically. Raises OSError."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def write_vllm_files(table: dict[str, Any], card: str) -> Path:
    """Write the table as the three files that vLLM reads for the device ``card``. Returns their
    folder, which is new and is removed when the process ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="toolkit-lora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stem = card.replace(" ", "_").replace("-", "_")
    for op in OPS:
        (folder / f"{stem}_{op}.json").write_text(json.dumps(table[op]))
    return folder


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, ToolkitWarning, stacklevel=3)
