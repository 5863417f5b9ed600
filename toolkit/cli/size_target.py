"""Read the target of ``envcheck size``: a run file or a model. For a model, every key of a run file
has its default value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.config.run_config import ModelSection, RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Document
    from toolkit.config.resolved import Situation

RUN_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
# Sections that do not change the size. Sizing ignores errors in them, such as a missing dataset.
SECTIONS_WITHOUT_SIZE = ("dataset", "reward")
CARD_RULES = ("HW001", "LOAD002", "LOAD004", "LOAD005")
STRUCTURE_RULE_PREFIXES = ("DOC", "YAML", "KEY", "TYPE", "SAFE")


def read_target(
    target: str, overrides: Sequence[str], situation: Situation
) -> tuple[RunConfig, Document | None]:
    """Return the run whose memory is computed, and the document of the run file (None if the target
    is a model).

    Raises:
        ConfigError: the run file has an error outside the sections ``dataset`` and ``reward``, or
            an override is invalid.
        InputError: the target cannot be read.
    """
    path = Path(target)
    is_run = target == "-" or (path.suffix in RUN_SUFFIXES and path.name != "config.json")
    if not is_run or path.is_dir() or (path.suffix == ".json" and _is_model_config(path)):
        return _default_run(target, overrides, situation), None
    return _read_run_file(path, overrides, situation)


def _is_model_config(path: Path) -> bool:
    """Whether a JSON file has the content of a model's config.json, although its name differs."""
    from toolkit.base.files import read_json  # noqa: PLC0415 - only for a JSON file

    values = read_json(path)
    return isinstance(values, dict) and "model_type" in values and "model" not in values


def _read_run_file(
    path: Path, overrides: Sequence[str], situation: Situation
) -> tuple[RunConfig, Document]:

    from toolkit.config.build_config import build_config  # noqa: PLC0415
    from toolkit.config.document_loader import load_document  # noqa: PLC0415
    from toolkit.config.validate import refusal_error, validate  # noqa: PLC0415

    document = load_document(path, overrides)
    validation = validate(document, situation)
    if validation.config is not None:
        return validation.config, document
    errors = [finding for finding in validation.findings if str(finding.severity) == "error"]
    blocking_errors = [
        finding
        for finding in errors
        if finding.rule.startswith(STRUCTURE_RULE_PREFIXES)
        or not (finding.path and finding.path[0] in SECTIONS_WITHOUT_SIZE)
    ]
    if blocking_errors:
        raise refusal_error(document, blocking_errors)
    return build_config(document), document


def _default_run(model: str, overrides: Sequence[str], situation: Situation) -> RunConfig:
    """Return a run of ``model`` with ``overrides``, and default values for all other keys.

    Raises ConfigError for an invalid override, and for a default value that the card does not
    support (found by the rules in ``CARD_RULES``). All other findings are ignored.
    """
    if not overrides and situation.device is None:
        return RunConfig(model=ModelSection(model_name=model))

    from toolkit.config.build_config import build_config  # noqa: PLC0415
    from toolkit.config.document_loader import assemble  # noqa: PLC0415
    from toolkit.config.source import Source  # noqa: PLC0415
    from toolkit.config.validate import refusal_error, validate  # noqa: PLC0415

    text = json.dumps({"model": {"model_name": model}})
    document = assemble(Source(model, text, Path.cwd(), None, "json"), overrides)
    validation = validate(document, situation)
    errors = [
        finding
        for finding in validation.findings
        if str(finding.severity) == "error"
        and (
            finding.rule in CARD_RULES
            or (finding.source is not None and finding.source.is_override)
        )
    ]
    if errors:
        raise refusal_error(document, errors)
    return build_config(document)
