"""What ``envcheck size`` is pointed at: a run file, or a model with the defaults of a run."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.config.model import LoraSection, ModelSection, RunConfig, RuntimeSection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Document

RUN_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
# A fault in these sections changes no size: a data set that is not on this machine stops nothing.
UNSIZED = ("dataset", "reward")
LENGTH_OF_RUN = "GRPO018"  # neither a data set nor max_steps: that changes no size either
STRUCTURE = ("DOC", "YAML", "KEY", "TYPE", "SAFE")


def read_target(
    target: str, overrides: Sequence[str], *, world_size: int
) -> tuple[RunConfig, Document | None]:
    """The run to size, and its document where it is a run file.

    Raises:
        ConfigError: the run file has faults (those of data, rewards and length aside), or an
            override is none.
        InputError: it cannot be read.
    """
    path = Path(target)
    is_run = target == "-" or (path.suffix in RUN_SUFFIXES and path.name != "config.json")
    if not is_run or path.is_dir() or (path.suffix == ".json" and _is_model_config(path)):
        return _of_model(target, overrides), None
    return _of_run_file(path, overrides, world_size)


def _is_model_config(path: Path) -> bool:
    """Whether a JSON file is a model's config.json under another name."""
    from toolkit.sizing.headers import read_json  # noqa: PLC0415 - only for a JSON file

    values = read_json(path)
    return isinstance(values, dict) and "model_type" in values and "model" not in values


def _of_run_file(
    path: Path, overrides: Sequence[str], world_size: int
) -> tuple[RunConfig, Document]:
    import os  # noqa: PLC0415 - with the next three: only for a run file

    from toolkit.config.build import build_config  # noqa: PLC0415
    from toolkit.config.layers import load_document  # noqa: PLC0415
    from toolkit.config.rules import Situation  # noqa: PLC0415
    from toolkit.config.validate import refusal, validate  # noqa: PLC0415

    document = load_document(path, overrides)
    judged = validate(document, Situation(world_size=world_size, environment=dict(os.environ)))
    if judged.config is not None:
        return judged.config, document
    faults = [found for found in judged.findings if str(found.severity) == "error"]
    stopping = [
        found
        for found in faults
        if found.rule.startswith(STRUCTURE)
        or not (found.rule == LENGTH_OF_RUN or (found.path and found.path[0] in UNSIZED))
    ]
    if stopping:
        raise refusal(document, stopping)
    return build_config(document), document


def _of_model(model: str, overrides: Sequence[str]) -> RunConfig:
    """A run of ``model`` with every default, and what ``overrides`` say."""
    sections: dict[str, Any] = {
        "model": ModelSection(model_name=model),
        "lora": LoraSection(),
        "runtime": RuntimeSection(),
    }
    grpo: dict[str, Any] = {}
    for text in overrides:
        name, found, raw = text.partition("=")
        section, _, key = name.partition(".")
        if not found or not key:
            raise InputError(f"--set {text!r} is not SECTION.KEY=VALUE", fix="--set lora.r=64")
        value = _value(raw)
        if section == "grpo":
            grpo[key] = value
        elif section in sections:
            sections[section] = _changed(sections[section], key, value, text)
        else:
            raise InputError(
                f"--set {text!r}: a model has no section {section!r}",
                fix="model, lora, grpo or runtime",
            )
    return RunConfig(
        model=sections["model"],
        lora=sections["lora"],
        runtime=sections["runtime"],
        grpo=MappingProxyType(grpo),
    )


def _value(raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw


def _changed(section: Any, key: str, value: Any, text: str) -> Any:
    known = {each.name for each in fields(section)}
    if key not in known:
        raise InputError(f"--set {text!r}: no such key", fix=f"one of {', '.join(sorted(known))}")
    default = getattr(section, key)
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if isinstance(value, list):
        value = tuple(value)
    wrong = (number and (isinstance(value, bool) or not isinstance(value, int | float))) or (
        isinstance(default, bool) and not isinstance(value, bool)
    )
    if wrong:
        raise InputError(f"--set {text!r}: {key} takes a value like {default!r}")
    return replace(section, **{key: value})
