"""Find the tool to which a file belongs, and read the settings in the file."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.files import read_bytes
from toolkit.config.importers.documents import from_document
from toolkit.config.importers.foreign import Computed, ForeignConfig
from toolkit.config.importers.shell import argument_value, parse_options, split_commands

if TYPE_CHECKING:
    from toolkit.config.document import Document
    from toolkit.config.finding import Finding
    from toolkit.config.importers.mapping import Table
    from toolkit.config.importers.shell import Word
    from toolkit.config.source import Source

# the name of each format, and the module with its table
TABLE_MODULES = {
    "axolotl": "axolotl",
    "trl": "trl",
    "script": "scripts",
    "verl": "verl",
    "prime-rl": "prime_rl",
    "ms-swift": "swift",
}
MAX_NOTEBOOK_BYTES = 32 << 20
SCRIPT_SUFFIXES = (".py", ".ipynb", ".sh", ".bash", ".txt")
# Keys that occur at the top level of a tool's files. A file is assigned to a tool if it has one of
# the keys in ``_IDENTIFYING_KEYS``, or several of these keys (see ``_guess_by_keys``).
_TYPICAL_KEYS: dict[str, tuple[str, ...]] = {
    "axolotl": ("base_model", "micro_batch_size", "sequence_len", "datasets", "rl", "adapter",
                "lora_target_linear", "num_epochs", "trl"),
    "verl": ("actor_rollout_ref", "algorithm", "critic", "data", "trainer",
             "custom_reward_function", "reward_model"),
    "ms-swift": ("rlhf_type", "train_type", "tuner_type", "torch_dtype", "external_plugins",
                 "quant_bits", "lora_rank", "target_modules", "sft_type"),
    "prime-rl": ("orchestrator", "trainer", "inference", "deployment", "environment", "sampling",
                 "rollouts_per_example", "group_size", "ckpt", "optim", "wandb", "seq_len",
                 "weight_broadcast", "max_steps"),
    "trl": ("model_name_or_path", "dataset_name", "use_peft", "lora_r", "reward_funcs",
            "num_generations", "per_device_train_batch_size", "dataset_train_split",
            "max_completion_length"),
}  # fmt: skip
_IDENTIFYING_KEYS = {"base_model": "axolotl", "actor_rollout_ref": "verl", "rlhf_type": "ms-swift",
         "orchestrator": "prime-rl", "model_name_or_path": "trl"}  # fmt: skip
_HYDRA_OVERRIDE = re.compile(r"(\+{0,2})(~?)([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)


@cache
def load_table(format_name: str) -> Table:
    """Return the table of the format ``format_name``, which defines how the keys of the format are
    converted.
    """
    loaded: Table = import_module(f"toolkit.config.importers.{TABLE_MODULES[format_name]}").TABLE
    return loaded


def guess_format(document: Document) -> tuple[str, tuple[str, ...]] | None:
    """Guess the format of a loaded file. Return the name of the format, and the keys or words that
    identify it. Return None for a run file, and for a file of an unknown format.
    """
    root = document.root.value
    if isinstance(root, dict) and root:
        model = root.get("model")
        if model is not None and isinstance(model.value, dict) and "model_name" in model.value:
            return None
        match = _guess_by_keys(root)
        if match is not None:
            return match
        if "cells" in root and "nbformat" in root:
            return "script", ("cells", "nbformat")
    return _guess_by_text(document.source)


TITLES = {
    "axolotl": "an axolotl config", "trl": "a TRL config or command line",
    "script": "a script or notebook for TRL or Unsloth", "verl": "a verl config or command line",
    "prime-rl": "a prime-rl config", "ms-swift": "an ms-swift config or command line",
}  # fmt: skip


def foreign_config_finding(document: Document) -> Finding | None:
    """Return the finding IMPORT001 if a loaded file looks like a file of another
    tool; else None.
    """
    from toolkit.config.finding import Fix, error_finding  # noqa: PLC0415 - only for such a file

    match = guess_format(document)
    if match is None:
        return None
    format_name, signs = match
    title = TITLES[format_name]
    message = f"this looks like {title} ({', '.join(signs)}), not a run file of this toolkit"
    first = document.root.value.get(signs[0]) if isinstance(document.root.value, dict) else None
    position = None if first is None else first.key_position
    name = document.source.name if document.source.path else "FILE"
    fix = Fix(f"convert the file to a run file with `toolkit import {name}`")
    return error_finding("IMPORT001", message, document.source, position, fix)


def _guess_by_keys(root: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    for key, format_name in _IDENTIFYING_KEYS.items():
        if key in root:
            matching_keys = [one for one in _TYPICAL_KEYS[format_name] if one in root]
            return format_name, tuple(dict.fromkeys((key, *matching_keys)))[:4]
    best = max(
        _TYPICAL_KEYS,
        key=lambda format_name: sum(one in root for one in _TYPICAL_KEYS[format_name]),
    )
    matching_keys = [one for one in _TYPICAL_KEYS[best] if one in root]
    needed_count = 3 if best in ("prime-rl", "trl") else 2
    run_file_sections = {"lora", "dataset", "reward", "grpo", "runtime"} & set(root)
    return (
        (best, tuple(matching_keys[:4]))
        if len(matching_keys) >= needed_count and not run_file_sections
        else None
    )


def _guess_by_text(source: Source) -> tuple[str, tuple[str, ...]] | None:
    suffix = source.path.suffix.lower() if source.path else ""
    if suffix not in SCRIPT_SUFFIXES:
        return None
    text = source.text
    for word in ("GRPOConfig", "GRPOTrainer", "FastLanguageModel"):
        if word in text and suffix in (".py", ".ipynb"):
            return "script", (word,)
    for sign, format_name in _COMMAND_PATTERNS.items():
        if re.search(sign, text):
            return format_name, (re.search(sign, text)[0],)  # type: ignore[index]  # it was found above
    return None


_PROGRAM = re.compile(r"(^|/)(grpo|rlhf|rl)(\.py)?$")
_COMMAND_PATTERNS = {
    r"swift(\.exe)? rlhf|swift/cli/rlhf|swift\.cli\.rlhf": "ms-swift",
    r"verl\.trainer\.main_ppo|recipe\.\w+\.main_\w+": "verl",
    r"trl grpo|trl/scripts/grpo\.py|trl\.scripts\.grpo": "trl",
    r"uv run rl\b|prime_rl": "prime-rl",
}


def read_foreign_config(name: str, format_name: str | None = None) -> ForeignConfig:
    """Return the settings in the file ``name``. ``format_name`` is the name of the file's format;
    None means that the format is guessed. Raises InputError if the file cannot be read or its
    format is unknown.
    """
    from toolkit.config.document_loader import parse_source  # noqa: PLC0415 - config.document_loader is above this package
    from toolkit.config.text_reader import UnreadableText, read_source  # noqa: PLC0415

    suffix = Path(name).suffix.lower()
    if suffix == ".ipynb":
        return _read_notebook_file(name)
    try:
        source = read_source(name)
    except UnreadableText as error:
        raise InputError(error.finding.message, where=name) from None
    if suffix == ".py":
        return _read_script_source(source)
    if suffix in SCRIPT_SUFFIXES:
        return _read_first_command(source, format_name)
    document = parse_source(source)
    guessed_format = format_name or (guess_format(document) or (None,))[0]
    if guessed_format is None:
        return _read_first_command(source, None)
    if not document.root.value:
        message = document.findings[0].message if document.findings else "the file is empty"
        raise InputError(f"cannot be read: {message}", where=name)
    if guessed_format == "script":
        return _read_notebook_file(name) if name != "-" else _read_script_source(source)
    return from_document(document, load_table(guessed_format))


def _read_notebook_file(name: str) -> ForeignConfig:
    from toolkit.config.importers.notebooks import read_notebook  # noqa: PLC0415 - only notebooks need it

    try:
        return _require_settings(
            read_notebook(read_bytes(name, limit=MAX_NOTEBOOK_BYTES), name), name
        )
    except ValueError as error:
        raise InputError(f"cannot be read as a notebook: {error}", where=name) from None


def _read_script_source(source: Source) -> ForeignConfig:
    from toolkit.config.importers.scripts import read_script  # noqa: PLC0415 - only scripts need it

    try:
        return _require_settings(read_script(source.text), source.name)
    except ValueError as error:
        raise InputError(f"cannot be read as Python: {error}", where=source.name) from None


def _require_settings(foreign: ForeignConfig, name: str) -> ForeignConfig:
    if not foreign.entries and not foreign.unread:
        raise unknown_format_error(name)
    return foreign


def _read_first_command(source: Source, format_name: str | None) -> ForeignConfig:
    """Return the settings of the first training command in a shell script."""
    for words in split_commands(source.text):
        line = " ".join(word.text for word in words[:8])
        command_format = format_name or next(
            (kind for sign, kind in _COMMAND_PATTERNS.items() if re.search(sign, line)), None
        )
        if command_format is None or (format_name is None and not _has_settings(words)):
            continue
        foreign = ForeignConfig(command_format)
        _add_overrides(foreign, words) if command_format == "verl" else _add_flags(foreign, words)
        return _require_settings(foreign, source.name)
    raise unknown_format_error(source.name)


def _has_settings(words: list[Word]) -> bool:
    return any(word.text.startswith("--") or "=" in word.text or word.text == "@" for word in words)


def _add_flags(foreign: ForeignConfig, words: list[Word]) -> None:
    starts = [index for index, word in enumerate(words) if _PROGRAM.search(word.text)]
    words = words[starts[0] :] if starts else words
    for index, word in enumerate(words[:-1]):
        if word.text == "@":
            why = "more settings are in that file: import that file instead"
            foreign.record_unread(f"line {word.line}", f"@ {words[index + 1].text}", why)
    for key, value, line in parse_options(words):
        if key == "config" and isinstance(value, str):
            why = "more settings are in that file: import that file instead"
            foreign.record_unread(f"line {line}", f"--config {value}", why)
        else:
            foreign.add(key, value, f"line {line}")


def _add_overrides(foreign: ForeignConfig, words: list[Word]) -> None:
    for word in words:
        match = _HYDRA_OVERRIDE.fullmatch(word.text)
        location = f"line {word.line}"
        if match is None:
            if word.text.startswith("--config"):
                foreign.record_unread(
                    location, word.text, "this config file of hydra contains more settings"
                )
            continue
        value: Any = argument_value(match[4])
        if word.unknown_part:
            value = Computed(
                match[4], f"the value of {word.unknown_part} is known only when the shell runs"
            )
        foreign.add(match[3], value, location)


def unknown_format_error(name: str) -> InputError:
    """Return the error for the file ``name``, whose format is unknown."""
    return InputError(
        "is not recognized as a file that can be imported. These files can be imported: "
        "axolotl (YAML), TRL (YAML, command line, script), Unsloth (script, notebook), verl (YAML, "
        "overrides), prime-rl (TOML), ms-swift (YAML, command line)",
        where=name,
        fix="state the format with `--from`, or write a run file yourself (`envcheck schema run` "
        "prints the schema)",
    )
