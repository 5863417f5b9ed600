"""What loading and the schema find, so that it can be explained like a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from toolkit.config.bounds import MAX_ALIASED, MAX_BYTES, MAX_DEPTH, MAX_FINDINGS, MAX_NODES
from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RULES, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run
    from toolkit.config.rules.violation import Fault


class Told(NamedTuple):
    """The texts of one finding."""

    summary: str
    why: str
    example: str
    fix: str
    severity: Severity = Severity.ERROR


TOLD: dict[str, Told] = {
    "DOC001": Told(
        "The text is YAML, JSON or TOML, and a mapping of keys.",
        "Reading stops at the first syntax error, so that one is told at a time.",
        "model: {model_name: x\nlora: {r: 16}",
        "close the bracket",
    ),
    "DOC002": Told(
        "No key is written twice in one mapping.",
        "Readers take the first or the last of the two, silently.",
        "grpo:\n  beta: 0.0\n  beta: 0.1",
        "remove one of the two",
    ),
    "DOC003": Told(
        "There are no YAML tags.",
        "A tag (!!python/object, !!str, !include) gives a value another type than it shows, and "
        "some readers run code for one.",
        "lora:\n  r: !!str 16",
        "lora:\n  r: 16",
    ),
    "DOC004": Told(
        "YAML is indented with spaces.",
        "YAML forbids tabs there, for nobody sees how wide they are.",
        "lora:\n\tr: 16",
        "lora:\n  r: 16",
    ),
    "DOC005": Told(
        "A run file is one document.",
        "A second document after --- would be ignored.",
        "model: {model_name: x}\n---\nmodel: {model_name: y}",
        "keep one run a file, and share settings with extends:",
    ),
    "DOC006": Told(
        "Numbers are finite.",
        "NaN and infinities pass every comparison, or none.",
        "grpo:\n  learning_rate: .nan",
        "grpo:\n  learning_rate: 1.0e-6",
    ),
    "DOC007": Told(
        "YAML 1.1 and YAML 1.2 read a value alike.",
        "Run files are YAML 1.2 (core schema). Other tools, PyYAML among them, read YAML 1.1, "
        "where 5e-6 is text, no is false, 0755 is octal, 12:30:00 counts seconds and 1_024 is a "
        "number. The fix spells the value so that both agree.",
        "grpo:\n  learning_rate: 5e-6",
        "grpo:\n  learning_rate: 5.0e-6",
        Severity.WARNING,
    ),
    "DOC008": Told(
        "There are no merge keys.",
        "<< is a feature of YAML 1.1 that YAML 1.2 dropped: readers disagree on what it does.",
        "lora:\n  <<: *defaults",
        "extends: base.yaml",
    ),
    "DOC009": Told(
        "A run file is of moderate size.",
        f"At most {MAX_BYTES >> 10} KiB, {MAX_DEPTH} levels, {MAX_NODES:,} values, and "
        f"{MAX_ALIASED:,} by aliases; none may contain itself. Of more than {MAX_FINDINGS} "
        f"findings the first {MAX_FINDINGS} are told.",
        "model: &m\n  again: *m",
        "write the values out",
    ),
    "DOC010": Told(
        "Keys are plain names.",
        "A list or a mapping as a key is legal YAML and no key of a run file.",
        "? [a, b]\n: 1",
        "write a name",
    ),
    "DOC011": Told(
        "extends names another run file, and not in a circle.",
        "The path is relative to the file that names it. Mappings merge; everything else is "
        "replaced by the file that extends. Relative paths in the base stay relative to the base.",
        "extends: missing.yaml",
        "extends: base.yaml",
    ),
    "DOC012": Told(
        "An override is key=value.",
        "The key is dotted and may have numbers for items of a list; the value is YAML.",
        "--set grpo.max_steps",
        "--set grpo.max_steps=10",
    ),
    "DOC013": Told(
        "There are no control characters.",
        "YAML allows none but tab and line ends.",
        'model: {model_name: "\\x01"}',
        "remove it",
    ),
    "DOC014": Told(
        "The file can be read, and is UTF-8 text.",
        "A missing file, a folder, a file without permission, one that is too large, and other "
        "encodings end with exit code 2.",
        "envcheck validate missing.yaml",
        "name a file that is there",
    ),
    "DOC015": Told(
        "Integers fit into 64 bits.",
        "No key takes a larger one, and libraries cut it or fail on it.",
        "grpo:\n  max_steps: 99999999999999999999",
        "grpo:\n  max_steps: 1000",
    ),
    "DOC016": Told(
        "extends stays in the run file's folder.",
        "A run file from someone else must not read other files of this machine. The base lies "
        "below the folder of the run file that is loaded, links followed, or below a folder that "
        "the environment variable TOOLKIT_EXTENDS_FROM names (several: with a colon between).",
        "extends: /etc/shadow",
        "extends: base.yaml",
    ),
    "DOC017": Told(
        "extends names a run file.",
        "Its name ends in .yaml, .yml, .json or .toml, and it is a mapping with a run file's "
        "sections. Of anything else no line is shown.",
        "extends: notes.txt",
        "extends: base.yaml",
    ),
    "KEY001": Told(
        "Every key is known.",
        "An unknown key would be ignored, and the run would not be what its file says.",
        "lora:\n  lora_alfa: 16",
        "lora:\n  lora_alpha: 16",
    ),
    "KEY002": Told(
        "Required keys are there.",
        "model.model_name, and the name of each reward function, have no default.",
        "model: {max_seq_length: 1024}",
        "model: {model_name: Qwen/Qwen3-0.6B}",
    ),
    "KEY003": Told(
        "Values have the type that the key takes.",
        'An integer is written without a point (8, not 8.0) and without quotes (8, not "8").',
        "lora:\n  r: 8.0",
        "lora:\n  r: 8",
    ),
    "KEY004": Told(
        "Values are among those that the key takes.",
        "The legal values are in the finding, and in envcheck explain KEY.",
        "grpo:\n  loss_type: DAPO",
        "grpo:\n  loss_type: dapo",
    ),
    "KEY005": Told(
        "Numbers are in range, and texts and lists are not empty.",
        "The range is in the finding, and in envcheck explain KEY.",
        "grpo:\n  per_device_train_batch_size: 0",
        "grpo:\n  per_device_train_batch_size: 1",
    ),
    "KEY006": Told(
        "null is written only where it means something.",
        "A key with nothing after it is null. To have the default, leave the key out.",
        "grpo:\n  beta:",
        "remove the line",
    ),
}  # fmt: skip


def _nothing(_run: Run) -> Iterator[Fault]:
    yield from ()


for _name, _told in TOLD.items():
    RULES[_name] = Rule(
        id=_name,
        severity=_told.severity,
        keys=(),
        summary=_told.summary,
        why=_told.why,
        example=_told.example,
        fix=_told.fix,
        check=_nothing,
    )
