"""What ``envcheck size`` is pointed at: a run file, or a model with the defaults of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.config.model import ModelSection, RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Document

RUN_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
# A fault in these sections changes no size: a data set that is not on this machine stops nothing.
UNSIZED = ("dataset", "reward")
STRUCTURE = ("DOC", "YAML", "KEY", "TYPE", "SAFE")


def read_target(
    target: str, overrides: Sequence[str], *, world_size: int
) -> tuple[RunConfig, Document | None]:
    """The run to size, and its document where it is a run file.

    Raises:
        ConfigError: the run file has faults (those of data and rewards aside), or an
            override is none.
        InputError: it cannot be read.
    """
    path = Path(target)
    is_run = target == "-" or (path.suffix in RUN_SUFFIXES and path.name != "config.json")
    if not is_run or path.is_dir() or (path.suffix == ".json" and _is_model_config(path)):
        return _of_model(target, overrides, world_size), None
    return _of_run_file(path, overrides, world_size)


def _is_model_config(path: Path) -> bool:
    """Whether a JSON file is a model's config.json under another name."""
    from toolkit.base.files import read_json  # noqa: PLC0415 - only for a JSON file

    values = read_json(path)
    return isinstance(values, dict) and "model_type" in values and "model" not in values


def _of_run_file(
    path: Path, overrides: Sequence[str], world_size: int
) -> tuple[RunConfig, Document]:

    from toolkit.config.build import build_config  # noqa: PLC0415
    from toolkit.config.layers import load_document  # noqa: PLC0415
    from toolkit.config.rules import Situation  # noqa: PLC0415
    from toolkit.config.validate import refusal, validate  # noqa: PLC0415

    document = load_document(path, overrides)
    judged = validate(document, Situation(world_size=world_size))
    if judged.config is not None:
        return judged.config, document
    faults = [found for found in judged.findings if str(found.severity) == "error"]
    stopping = [
        found
        for found in faults
        if found.rule.startswith(STRUCTURE) or not (found.path and found.path[0] in UNSIZED)
    ]
    if stopping:
        raise refusal(document, stopping)
    return build_config(document), document


def _of_model(model: str, overrides: Sequence[str], world_size: int) -> RunConfig:
    """A run of ``model`` with every default, and what ``overrides`` say: they are judged as in a
    run file, the defaults are not.
    """
    if not overrides:
        return RunConfig(model=ModelSection(model_name=model))

    from toolkit.config.build import build_config  # noqa: PLC0415
    from toolkit.config.document import Source  # noqa: PLC0415
    from toolkit.config.layers import assemble  # noqa: PLC0415
    from toolkit.config.rules import Situation  # noqa: PLC0415
    from toolkit.config.validate import refusal, validate  # noqa: PLC0415

    text = json.dumps({"model": {"model_name": model}})
    document = assemble(Source(model, text, Path.cwd(), None, "json"), overrides)
    judged = validate(document, Situation(world_size=world_size))
    faults = [
        found
        for found in judged.findings
        if str(found.severity) == "error" and found.source is not None and found.source.is_override
    ]
    if faults:
        raise refusal(document, faults)
    return build_config(document)
