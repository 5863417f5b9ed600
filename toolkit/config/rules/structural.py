"""Descriptions of the findings that loading and the schema report, so that `envcheck explain`
explains them like rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RULES, Rule
from toolkit.config.source import MAX_ALIASED, MAX_BYTES, MAX_DEPTH, MAX_FINDINGS, MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run
    from toolkit.config.rules.violation import RuleViolation


class RuleText(NamedTuple):
    """The texts that describe one of these rules."""

    summary: str
    why: str
    example: str
    fix: str
    severity: Severity = Severity.ERROR


RULE_TEXTS: dict[str, RuleText] = {
    "DOC001": RuleText(
        "The text is valid YAML, JSON or TOML, and a mapping of keys.",
        "Reading stops at the first syntax error, so each call reports only one.",
        "model: {model_name: x\nlora: {r: 16}",
        "close the bracket",
    ),
    "DOC002": RuleText(
        "No key occurs twice in one mapping.",
        "Some readers silently use the first one, others the last.",
        "grpo:\n  beta: 0.0\n  beta: 0.1",
        "remove one of the two",
    ),
    "DOC003": RuleText(
        "YAML tags are not used.",
        "A tag (!!python/object, !!str, !include) gives a value a type that its spelling does "
        "not show, and some readers run code for a tag.",
        "lora:\n  r: !!str 16",
        "lora:\n  r: 16",
    ),
    "DOC004": RuleText(
        "YAML is indented with spaces.",
        "YAML forbids tabs in indentation, because their width is not defined.",
        "lora:\n\tr: 16",
        "lora:\n  r: 16",
    ),
    "DOC005": RuleText(
        "A run file has one YAML document.",
        "A second document after --- would be ignored.",
        "model: {model_name: x}\n---\nmodel: {model_name: y}",
        "write one run per file, and share settings with extends:",
    ),
    "DOC006": RuleText(
        "Numbers are finite.",
        "NaN and infinity make range checks meaningless.",
        "grpo:\n  learning_rate: .nan",
        "grpo:\n  learning_rate: 1.0e-6",
    ),
    "DOC007": RuleText(
        "YAML 1.1 and YAML 1.2 read every value the same way.",
        "Run files are YAML 1.2 (core schema). Other tools, such as PyYAML, read YAML 1.1. "
        "There 5e-6 is text, no is false, 0755 is octal, 12:30:00 is a number of seconds and "
        "1_024 is a number. The fix writes the value so that both versions agree.",
        "grpo:\n  learning_rate: 5e-6",
        "grpo:\n  learning_rate: 5.0e-6",
        Severity.WARNING,
    ),
    "DOC008": RuleText(
        "YAML merge keys are not used.",
        "<< is a feature of YAML 1.1 that YAML 1.2 removed, and readers treat it differently.",
        "lora:\n  <<: *defaults",
        "extends: base.yaml",
    ),
    "DOC009": RuleText(
        "The size of a run file is limited.",
        f"It has at most {MAX_BYTES >> 10} KiB, {MAX_DEPTH} levels, {MAX_NODES:,} values, and "
        f"{MAX_ALIASED:,} values from aliases. No alias may contain itself. At most "
        f"{MAX_FINDINGS} findings are shown.",
        "model: &m\n  again: *m",
        "write the values out",
    ),
    "DOC010": RuleText(
        "Keys are plain names.",
        "YAML allows a list or a mapping as a key, but run files do not.",
        "? [a, b]\n: 1",
        "write a name",
    ),
    "DOC011": RuleText(
        "extends names another run file, and no file extends itself, even indirectly.",
        "The path is relative to the file that names it. Mappings are merged. Everything else "
        "in the extended file is replaced by the value in the file that extends it. Relative "
        "paths in the extended file stay relative to the extended file.",
        "extends: missing.yaml",
        "extends: base.yaml",
    ),
    "DOC012": RuleText(
        "An override is key=value.",
        "The key is dotted, with numbers for list items. The value is YAML.",
        "--set grpo.max_steps",
        "--set grpo.max_steps=10",
    ),
    "DOC013": RuleText(
        "The text has no control characters.",
        "YAML allows only tabs and line ends.",
        'model: {model_name: "\\x01"}',
        "remove the character",
    ),
    "DOC014": RuleText(
        "The file can be read, and is UTF-8 text.",
        "A missing file, a folder, missing permission, a file that is too large, and other "
        "encodings end with exit code 2.",
        "envcheck validate missing.yaml",
        "name an existing file",
    ),
    "DOC015": RuleText(
        "Integers fit into 64 bits.",
        "No key accepts a larger integer, and libraries truncate it or fail.",
        "grpo:\n  max_steps: 99999999999999999999",
        "grpo:\n  max_steps: 1000",
    ),
    "DOC016": RuleText(
        "extends stays in the run file's folder.",
        "A run file from someone else must not read other files on this machine. The extended "
        "file must be below the folder of the loaded run file, or below a folder in the "
        "environment variable TOOLKIT_EXTENDS_FROM (separate several with a colon). Links are "
        "resolved first.",
        "extends: /etc/shadow",
        "extends: base.yaml",
    ),
    "DOC017": RuleText(
        "extends names a run file.",
        "The file's name ends in .yaml, .yml, .json or .toml, and the file is a mapping with "
        "sections of a run file. For any other file, no line of its content is shown.",
        "extends: notes.txt",
        "extends: base.yaml",
    ),
    "IMPORT001": RuleText(
        "A run file is not another tool's config, script or notebook.",
        "toolkit import reads files of axolotl, TRL, Unsloth, verl, prime-rl and ms-swift, writes "
        "a run file with a comment for each line that was translated or left out, and validates "
        "it. envcheck validate accepts only run files.",
        "base_model: Qwen/Qwen3-0.6B\nrl: grpo\nadapter: lora",
        "toolkit import FILE",
    ),
    "KEY001": RuleText(
        "Every key is known.",
        "An unknown key would be ignored, and the run would differ from its file.",
        "lora:\n  lora_alfa: 16",
        "lora:\n  lora_alpha: 16",
    ),
    "KEY002": RuleText(
        "Required keys are present.",
        "model.model_name and the name of each reward function have no default.",
        "model: {max_seq_length: 1024}",
        "model: {model_name: Qwen/Qwen3-0.6B}",
    ),
    "KEY003": RuleText(
        "Values have the type that the key requires.",
        'Write an integer without a decimal point (8, not 8.0) and without quotes (8, not "8").',
        "lora:\n  r: 8.0",
        "lora:\n  r: 8",
    ),
    "KEY004": RuleText(
        "Values are among those that the key allows.",
        "The legal values are in the finding, and in envcheck explain KEY.",
        "grpo:\n  loss_type: DAPO",
        "grpo:\n  loss_type: dapo",
    ),
    "KEY005": RuleText(
        "Numbers are in range, and strings and lists are not empty.",
        "The range is in the finding, and in envcheck explain KEY.",
        "grpo:\n  per_device_train_batch_size: 0",
        "grpo:\n  per_device_train_batch_size: 1",
    ),
    "KEY006": RuleText(
        "null is used only for keys that accept it.",
        "A key without a value is null. To get the default, remove the key.",
        "grpo:\n  beta:",
        "remove the line",
    ),
}  # fmt: skip


def _nothing(_run: Run) -> Iterator[RuleViolation]:
    yield from ()


for _name, _text in RULE_TEXTS.items():
    RULES[_name] = Rule(
        id=_name,
        severity=_text.severity,
        keys=(),
        summary=_text.summary,
        why=_text.why,
        example=_text.example,
        fix=_text.fix,
        check=_nothing,
    )
