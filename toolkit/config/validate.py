"""Validate a document: check its structure, then apply every rule. Build the frozen RunConfig from
a valid document.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, InputError
from toolkit.config.build_config import build_config
from toolkit.config.document_loader import load_document
from toolkit.config.finding import Finding, Severity
from toolkit.config.rules import Run, Situation, rules_with_checks
from toolkit.config.schemas import find_schema
from toolkit.config.source import MAX_FINDINGS
from toolkit.config.structure import check_structure
from toolkit.config.text_reader import UNREADABLE_RULE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from toolkit.config.document import Document, Node
    from toolkit.config.finding import Fix
    from toolkit.config.run_config import RunConfig
    from toolkit.config.source import KeyPath


@dataclass(frozen=True)
class Validation:
    """The result of validation: the document and its findings. The findings are sorted by position,
    and those of ``--set`` overrides come last.
    """

    findings: tuple[Finding, ...]
    document: Document

    @property
    def ok(self) -> bool:
        """Whether the run is accepted. A run is accepted if no finding has the severity error."""
        return all(finding.severity is not Severity.ERROR for finding in self.findings)

    @cached_property
    def config(self) -> RunConfig | None:
        """The validated run as a frozen RunConfig; None if a finding is an error."""
        return build_config(self.document) if self.ok else None


def validate(document: Document, situation: Situation | None = None) -> Validation:
    """Validate a loaded document, and return its findings. ``situation`` contains facts that are
    not in the run file, such as the number of processes and the device.
    """
    findings = list(document.findings)
    foreign_config = _foreign_config_finding(document)
    if foreign_config is not None:
        findings = [foreign_config]
    elif document.is_readable and document.is_complete:
        structure = check_structure(document.root, find_schema("run"), _key_advice)
        run = Run(document, structure.invalid_paths, situation or Situation())
        rule_findings = [finding for rule in rules_with_checks() for finding in rule.findings(run)]
        paths_with_better_finding = {
            finding.path for finding in rule_findings if finding.rule in _RULES_BEFORE_UNKNOWN_KEY
        }
        findings += [
            finding
            for finding in structure.findings
            if finding.rule != "KEY001" or finding.path not in paths_with_better_finding
        ]
        findings += rule_findings
    findings = _limit_findings(sorted(findings, key=_sort_key))
    return Validation(tuple(findings), document)


def _key_advice(
    path: KeyPath, node: Node, properties: dict[str, Any], root: Node
) -> tuple[tuple[str, ...], tuple[Fix, ...]]:
    from toolkit.config.suggest import key_advice  # noqa: PLC0415 - only for an unknown key

    return key_advice(path, node, properties, root)


def _foreign_config_finding(document: Document) -> Finding | None:
    """Return the finding IMPORT001 if the document is a config of another tool, else None. This one
    finding is then reported instead of a finding for each unknown key.
    """
    model = document.find_node(("model", "model_name"))
    if model is not None or not document.is_readable:
        return None
    from toolkit.config.importers.formats import foreign_config_finding  # noqa: PLC0415 - only for a file that is not a run file

    return foreign_config_finding(document)


def _limit_findings(findings: list[Finding]) -> list[Finding]:
    """Return the first MAX_FINDINGS findings. If there are more findings, the last returned finding
    states the number of findings that are left out.
    """
    if len(findings) <= MAX_FINDINGS:
        return findings
    last = findings[MAX_FINDINGS]
    message = f"{len(findings) - MAX_FINDINGS} more findings are not shown"
    summary = replace(
        last, rule="DOC009", severity=Severity.ERROR, message=message, path=(), notes=(), fixes=()
    )
    return [*findings[:MAX_FINDINGS], replace(summary, related=(), unknown=False)]


# If one of these rules reports a key, KEY001 (unknown key) does not report it too.
_RULES_BEFORE_UNKNOWN_KEY = frozenset(("SAFE001", "KEY009", "GRPO019"))


def _sort_key(finding: Finding) -> tuple[bool, str, int, int, str]:
    """Return the sort key of a finding. It sorts findings by position, and puts the findings of
    ``--set`` overrides last.
    """
    source, position = finding.source, finding.position
    is_override = source is not None and source.is_override
    line, column = (position.line, position.column) if position else (0, 0)
    return (is_override, source.name if source else "", line, column, finding.rule)


def load_run(path: str | Path, overrides: Sequence[str] = (), *, world_size: int = 1) -> RunConfig:
    """Return the validated config of the run file at ``path``, with ``key=value`` overrides
    applied.

    Raises InputError if the file cannot be read, and ConfigError with the text of all findings if
    one of them is an error.
    """
    return validated_config(load_document(path, overrides), Situation(world_size=world_size))


def validated_config(document: Document, situation: Situation | None = None) -> RunConfig:
    """Return the RunConfig of a loaded document, after validating it for ``situation``. Raises the
    same errors as ``load_run``.
    """
    validation = validate(document, situation)
    if validation.config is not None:
        return validation.config
    raise refusal_error(document, validation.findings)


def refusal_error(document: Document, findings: Sequence[Finding]) -> InputError | ConfigError:
    """Return the error that a command raises if validation refuses its run file. ``findings`` are
    the findings of the validation.
    """
    from toolkit.config.finding_output import render_text  # noqa: PLC0415 - only for a fault

    if document.is_readable:
        return ConfigError("the run file is refused\n" + render_text(findings))
    unreadable = next(finding for finding in findings if finding.rule == UNREADABLE_RULE)
    fix = " or ".join(one.text for one in unreadable.fixes) or None
    return InputError(unreadable.message, where=unreadable.location, fix=fix)


def check_instance(instance: object, schema_name: str) -> list[str]:
    """Check a JSON value with one of the project's schemas, and return the error messages of the
    jsonschema library. The list is empty if the value is valid.
    """
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - the import takes from 60 ms to a second
    from referencing import Registry  # noqa: PLC0415 - part of jsonschema

    # With an empty registry, the library does not download an unknown $ref.
    validator = Draft202012Validator(find_schema(schema_name), registry=Registry())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(instance)]
