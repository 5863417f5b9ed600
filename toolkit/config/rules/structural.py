"""Texts about faults that no rule function finds. These faults are found earlier, while a run file
is read and compared with the schema. `envcheck explain` shows the texts in the same form as rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RULES, Rule
from toolkit.config.source import MAX_ALIASED_NODES, MAX_BYTES, MAX_DEPTH, MAX_FINDINGS, MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run
    from toolkit.config.rules.violation import RuleViolation


class RuleText(NamedTuple):
    """The texts that `envcheck explain` shows about one kind of fault."""

    summary: str
    why: str
    example: str
    fix: str
    severity: Severity = Severity.ERROR


RULE_TEXTS: dict[str, RuleText] = {
    "DOC001": RuleText(
        "A run file is valid YAML, JSON or TOML, and its top level is a mapping.",
        "Reading stops at the first syntax error, so a validation reports only one syntax error.",
        "model: {model_name: x\nlora: {r: 16}",
        "close the bracket",
    ),
    "DOC002": RuleText(
        "No key occurs twice in one mapping.",
        "If a key occurs twice, some parsers silently use its first value, and others its last "
        "value.",
        "grpo:\n  beta: 0.0\n  beta: 0.1",
        "remove one of the two lines",
    ),
    "DOC003": RuleText(
        "YAML tags are not used.",
        "A tag (!!python/object, !!str, !include) gives a value another type than the value's "
        "spelling shows. Some parsers run code when they read a tag.",
        "lora:\n  r: !!str 16",
        "lora:\n  r: 16",
    ),
    "DOC004": RuleText(
        "YAML is indented with spaces.",
        "YAML forbids tabs in indentation, because the width of a tab is not defined.",
        "lora:\n\tr: 16",
        "lora:\n  r: 16",
    ),
    "DOC005": RuleText(
        "A run file has one YAML document.",
        "A second document after --- would be ignored.",
        "model: {model_name: x}\n---\nmodel: {model_name: y}",
        "write one run per file, and share settings with the key `extends`",
    ),
    "DOC006": RuleText(
        "Numbers are finite.",
        "NaN and infinity make range checks meaningless.",
        "grpo:\n  learning_rate: .nan",
        "grpo:\n  learning_rate: 1.0e-6",
    ),
    "DOC007": RuleText(
        "Every value has the same meaning in YAML 1.1 and in YAML 1.2.",
        "Run files are YAML 1.2 (core schema). Other tools, such as PyYAML, read YAML 1.1. "
        "YAML 1.1 reads `5e-6` as text, `no` as false, `0755` as an octal number, `12:30:00` as a "
        "number of seconds, and `1_024` as a number. The fix writes the value in a form that both "
        "versions read the same way.",
        "grpo:\n  learning_rate: 5e-6",
        "grpo:\n  learning_rate: 5.0e-6",
        Severity.WARNING,
    ),
    "DOC008": RuleText(
        "YAML merge keys are not used.",
        "The merge key << is a feature of YAML 1.1 that YAML 1.2 removed. Some parsers merge the "
        "mappings, and others read << as a plain key.",
        "lora:\n  <<: *defaults",
        "extends: base.yaml",
    ),
    "DOC009": RuleText(
        "The size of a run file is limited.",
        f"A run file has at most {MAX_BYTES >> 10} KiB, {MAX_DEPTH} levels of nesting, "
        f"{MAX_NODES:,} values, and {MAX_ALIASED_NODES:,} values from YAML aliases. An "
        f"alias must not contain itself. envcheck shows at most {MAX_FINDINGS} findings.",
        "model: &m\n  again: *m",
        "write the values without an alias",
    ),
    "DOC010": RuleText(
        "Keys are plain names.",
        "YAML allows a list or a mapping as a key, but run files do not.",
        "? [a, b]\n: 1",
        "use a name as the key",
    ),
    "DOC011": RuleText(
        "The value of `extends` is an existing run file. A file must not extend itself, even "
        "indirectly.",
        "The value of `extends` is the path of a base file, relative to the folder of the file "
        "that sets `extends`. If both files have a mapping at the same key, the two mappings are "
        "merged. Any other value in the base file is replaced by the value of the file that sets "
        "`extends`. Relative paths in the base file stay relative to the folder of the base file.",
        "extends: missing.yaml",
        "extends: base.yaml",
    ),
    "DOC012": RuleText(
        "An override (--set) has the form key=value.",
        "In an override key=value, dots separate the parts of the key, and a number selects a list "
        "item (reward.functions.0.name). The value is read as YAML.",
        "--set grpo.max_steps",
        "--set grpo.max_steps=10",
    ),
    "DOC013": RuleText(
        "A run file contains no control characters.",
        "The only control characters that YAML allows are tabs and line ends.",
        'model: {model_name: "\\x01"}',
        "remove the character",
    ),
    "DOC014": RuleText(
        "The file can be read, and is UTF-8 text.",
        "`envcheck validate` ends with exit code 2 if the file is missing, is a folder, cannot be "
        "read because of its permissions, is too large, or has an encoding other than UTF-8.",
        "envcheck validate missing.yaml",
        "name an existing file",
    ),
    "DOC015": RuleText(
        "Integers fit into 64 bits.",
        "No key accepts an integer of more than 64 bits, and libraries truncate such an integer "
        "or fail.",
        "grpo:\n  max_steps: 99999999999999999999",
        "grpo:\n  max_steps: 1000",
    ),
    "DOC016": RuleText(
        "`extends` must name a file in the folder of the run file, or in a folder below it.",
        "A run file from someone else must not read other files on this machine. The file that "
        "`extends` refers to must be in or below the folder of the run file, or in or below a "
        "folder in the environment variable TOOLKIT_EXTENDS_FROM (several folders are separated "
        "by colons). Symbolic links are resolved before the check.",
        "extends: /etc/shadow",
        "extends: base.yaml",
    ),
    "DOC017": RuleText(
        "The value of `extends` is a run file.",
        "The name of a run file ends in .yaml, .yml, .json or .toml, and its top level is a "
        "mapping with sections of a run file. A finding about any other file shows no line of the "
        "file, because it may be private.",
        "extends: notes.txt",
        "extends: base.yaml",
    ),
    "IMPORT001": RuleText(
        "A run file is not another tool's config, script or notebook.",
        "`envcheck validate` accepts only run files. `toolkit import` translates files of axolotl, "
        "TRL, Unsloth, verl, prime-rl and ms-swift into a run file, and validates this run file. "
        "A comment in the run file describes each line that was translated or left out.",
        "base_model: Qwen/Qwen3-0.6B\nrl: grpo\nadapter: lora",
        "run `toolkit import FILE`",
    ),
    "KEY001": RuleText(
        "Every key is known.",
        "An unknown key would be ignored, so the run would differ from its run file.",
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
        "A value is one of the values that the key allows.",
        "The legal values are listed in the finding and by `envcheck explain KEY`.",
        "grpo:\n  loss_type: DAPO",
        "grpo:\n  loss_type: dapo",
    ),
    "KEY005": RuleText(
        "Numbers are in range, and strings and lists are not empty.",
        "The legal range is shown in the finding and by `envcheck explain KEY`.",
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


def _no_violations(_run: Run) -> Iterator[RuleViolation]:
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
        check=_no_violations,
    )
