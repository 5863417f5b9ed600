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
from toolkit.config.importers.foreign import Computed, Foreign
from toolkit.config.importers.shell import commands, flags, scalar

if TYPE_CHECKING:
    from toolkit.config.document import Document
    from toolkit.config.finding import Finding
    from toolkit.config.importers.mapping import Table
    from toolkit.config.importers.shell import Word
    from toolkit.config.source import Source

# the name of each format, and the module with its table
TABLES = {
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
# the keys in ``_SURE``, or several of these keys (see ``_by_keys``).
_SIGNS: dict[str, tuple[str, ...]] = {
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
_SURE = {"base_model": "axolotl", "actor_rollout_ref": "verl", "rlhf_type": "ms-swift",
         "orchestrator": "prime-rl", "model_name_or_path": "trl"}  # fmt: skip
_OVERRIDE = re.compile(r"(\+{0,2})(~?)([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)


@cache
def table(form: str) -> Table:
    """Return the table of the format ``form``, which defines how the keys of the format are
    converted.
    """
    found: Table = import_module(f"toolkit.config.importers.{TABLES[form]}").TABLE
    return found


def guess(document: Document) -> tuple[str, tuple[str, ...]] | None:
    """Guess the format of a loaded file. Return the name of the format, and the keys or words that
    identify it. Return None for a run file, and for a file of an unknown format.
    """
    root = document.root.value
    if isinstance(root, dict) and root:
        model = root.get("model")
        if model is not None and isinstance(model.value, dict) and "model_name" in model.value:
            return None
        found = _by_keys(root)
        if found is not None:
            return found
        if "cells" in root and "nbformat" in root:
            return "script", ("cells", "nbformat")
    return _by_text(document.source)


TITLES = {
    "axolotl": "an axolotl config", "trl": "a TRL config or command line",
    "script": "a script or notebook for TRL or Unsloth", "verl": "a verl config or command line",
    "prime-rl": "a prime-rl config", "ms-swift": "an ms-swift config or command line",
}  # fmt: skip


def found_foreign(document: Document) -> Finding | None:
    """Return the finding IMPORT001 if a loaded file looks like a file of another
    tool; else None.
    """
    from toolkit.config.finding import Fix, error_finding  # noqa: PLC0415 - only for such a file

    found = guess(document)
    if found is None:
        return None
    form, signs = found
    message = f"this looks like {TITLES[form]} ({', '.join(signs)}), not a run file of this toolkit"
    first = document.root.value.get(signs[0]) if isinstance(document.root.value, dict) else None
    position = None if first is None else first.key_position
    name = document.source.name if document.source.path else "FILE"
    fix = Fix(f"convert the file to a run file with `toolkit import {name}`")
    return error_finding("IMPORT001", message, document.source, position, fix)


def _by_keys(root: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    for key, form in _SURE.items():
        if key in root:
            shown = [one for one in _SIGNS[form] if one in root]
            return form, tuple(dict.fromkeys((key, *shown)))[:4]
    best = max(_SIGNS, key=lambda form: sum(one in root for one in _SIGNS[form]))
    shown = [one for one in _SIGNS[best] if one in root]
    enough = 3 if best in ("prime-rl", "trl") else 2
    ours = {"lora", "dataset", "reward", "grpo", "runtime"} & set(root)
    return (best, tuple(shown[:4])) if len(shown) >= enough and not ours else None


def _by_text(source: Source) -> tuple[str, tuple[str, ...]] | None:
    suffix = source.path.suffix.lower() if source.path else ""
    if suffix not in SCRIPT_SUFFIXES:
        return None
    text = source.text
    for word in ("GRPOConfig", "GRPOTrainer", "FastLanguageModel"):
        if word in text and suffix in (".py", ".ipynb"):
            return "script", (word,)
    for sign, form in _COMMANDS.items():
        if re.search(sign, text):
            return form, (re.search(sign, text)[0],)  # type: ignore[index]  # it was found above
    return None


_PROGRAM = re.compile(r"(^|/)(grpo|rlhf|rl)(\.py)?$")
_COMMANDS = {
    r"swift(\.exe)? rlhf|swift/cli/rlhf|swift\.cli\.rlhf": "ms-swift",
    r"verl\.trainer\.main_ppo|recipe\.\w+\.main_\w+": "verl",
    r"trl grpo|trl/scripts/grpo\.py|trl\.scripts\.grpo": "trl",
    r"uv run rl\b|prime_rl": "prime-rl",
}


def read_foreign(name: str, form: str | None = None) -> Foreign:
    """Return the settings in the file ``name``. ``form`` is the name of the file's format; None
    means that the format is guessed. Raises InputError if the file cannot be read or its format is
    unknown.
    """
    from toolkit.config.layers import parse_source  # noqa: PLC0415 - config.layers is above this package
    from toolkit.config.text_reader import UnreadableText, read_source  # noqa: PLC0415

    suffix = Path(name).suffix.lower()
    if suffix == ".ipynb":
        return _notebook(name)
    try:
        source = read_source(name)
    except UnreadableText as error:
        raise InputError(error.finding.message, where=name) from None
    if suffix == ".py":
        return _script(source)
    if suffix in SCRIPT_SUFFIXES:
        return _commands(source, form)
    document = parse_source(source)
    found = form or (guess(document) or (None,))[0]
    if found is None:
        return _commands(source, None)
    if not document.root.value:
        message = document.findings[0].message if document.findings else "the file is empty"
        raise InputError(f"cannot be read: {message}", where=name)
    if found == "script":
        return _notebook(name) if name != "-" else _script(source)
    return from_document(document, table(found))


def _notebook(name: str) -> Foreign:
    from toolkit.config.importers.notebooks import read_notebook  # noqa: PLC0415 - only notebooks need it

    try:
        return _something(read_notebook(read_bytes(name, limit=MAX_NOTEBOOK_BYTES), name), name)
    except ValueError as error:
        raise InputError(f"cannot be read as a notebook: {error}", where=name) from None


def _script(source: Source) -> Foreign:
    from toolkit.config.importers.scripts import read_script  # noqa: PLC0415 - only scripts need it

    try:
        return _something(read_script(source.text), source.name)
    except ValueError as error:
        raise InputError(f"cannot be read as Python: {error}", where=source.name) from None


def _something(foreign: Foreign, name: str) -> Foreign:
    if not foreign.entries and not foreign.unread:
        raise unknown(name)
    return foreign


def _commands(source: Source, form: str | None) -> Foreign:
    """Return the settings of the first training command in a shell script."""
    for words in commands(source.text):
        line = " ".join(word.text for word in words[:8])
        found = form or next(
            (kind for sign, kind in _COMMANDS.items() if re.search(sign, line)), None
        )
        if found is None or (form is None and not _trains(words)):
            continue
        foreign = Foreign(found)
        _overrides(foreign, words) if found == "verl" else _flags(foreign, words)
        return _something(foreign, source.name)
    raise unknown(source.name)


def _trains(words: list[Word]) -> bool:
    return any(word.text.startswith("--") or "=" in word.text or word.text == "@" for word in words)


def _flags(foreign: Foreign, words: list[Word]) -> None:
    starts = [at for at, word in enumerate(words) if _PROGRAM.search(word.text)]
    words = words[starts[0] :] if starts else words
    for at, word in enumerate(words[:-1]):
        if word.text == "@":
            why = "more settings are in that file: import that file instead"
            foreign.miss(f"line {word.line}", f"@ {words[at + 1].text}", why)
    for key, value, line in flags(words):
        if key == "config" and isinstance(value, str):
            why = "more settings are in that file: import that file instead"
            foreign.miss(f"line {line}", f"--config {value}", why)
        else:
            foreign.add(key, value, f"line {line}")


def _overrides(foreign: Foreign, words: list[Word]) -> None:
    for word in words:
        found = _OVERRIDE.fullmatch(word.text)
        place = f"line {word.line}"
        if found is None:
            if word.text.startswith("--config"):
                foreign.miss(place, word.text, "this config file of hydra contains more settings")
            continue
        value: Any = scalar(found[4])
        if word.unknown:
            value = Computed(
                found[4], f"the value of {word.unknown} is known only when the shell runs"
            )
        foreign.add(found[3], value, place)


def unknown(name: str) -> InputError:
    """Return the error for the file ``name``, whose format is unknown."""
    return InputError(
        "is not recognized as a file that can be imported. These files can be imported: "
        "axolotl (YAML), TRL (YAML, command line, script), Unsloth (script, notebook), verl (YAML, "
        "overrides), prime-rl (TOML), ms-swift (YAML, command line)",
        where=name,
        fix="state the format with `--from`, or write a run file yourself (`envcheck schema run` "
        "prints the schema)",
    )
