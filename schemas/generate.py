"""Generate two parts of run.schema.json (``just schemas``). The grpo section is generated from the
installed TRL's GRPOConfig. The engine options of the model section are generated from
``config.engine_settings``.

For the grpo section, types, defaults and texts come from TRL (dataclass fields and docstrings).
Ranges, units, examples, some texts, and the fields that a run file may not set come from
grpo.overlay.json. With ``--check``, nothing is written, and the exit code is 1 if the file would
change.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from toolkit.config.engine_settings import schema_properties
from toolkit.config.run_config import ModelSection

FOLDER = Path(__file__).parent
DEFAULT_DESCRIPTIONS = {"True": "yes", "False": "no", "None": "the library decides"}
JSON_TYPES = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    dict: "object",
    list: "array",
}
PARAMETER = re.compile(r"^ {4}(\w+) \(.*?\):?\n((?: {8}.*\n|\n)+)", re.MULTILINE)
BULLET = re.compile(r"\s*- ((?:`[^`]+`(?: or )?)+)(?: \(default\))?: (.*)")


def grpo_section() -> dict[str, Any]:
    """Return the schema of the grpo section for the installed TRL."""
    import trl  # noqa: PLC0415 - it brings torch

    overlay = json.loads((FOLDER / "grpo.overlay.json").read_text(encoding="utf-8"))
    hints = typing.get_type_hints(trl.GRPOConfig)
    texts = field_docstrings(trl.GRPOConfig)
    properties = toolkit_keys()
    for field in dataclasses.fields(trl.GRPOConfig):
        if field.init:
            properties[field.name] = field_schema(
                field, hints[field.name], texts.get(field.name), overlay
            )
    unused = (set(overlay["fields"]) | set(overlay["refused"])) - set(properties)
    if unused:
        raise SystemExit(
            f"grpo.overlay.json contains fields that TRL {trl.__version__} does not have: "
            f"{sorted(unused)}"
        )
    return {
        "title": "GRPO training",
        "description": "The settings of GRPO training: the fields of TRL's GRPOConfig under TRL's "
        "names, and additional keys of the toolkit.",
        "$comment": f"Generated from trl {trl.__version__} (Apache-2.0); do not edit.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def toolkit_keys() -> dict[str, Any]:
    """Return the schemas of the keys that the toolkit adds to the grpo section. TRL removed one of
    them, max_prompt_length, in version 0.28, but the toolkit still shortens prompts that are too
    long.
    """
    return {
        "max_prompt_length": {
            "title": "Max prompt length",
            "description": "The maximum length of a prompt. A longer prompt loses tokens at its "
            "start, and the run reports how many prompts were shortened. null: max_seq_length "
            "minus max_completion_length.",
            "type": ["integer", "null"],
            "minimum": 1,
            "default": None,
            "examples": [256, 1024],
            "x-unit": "tokens",
        },
        "dynamic_sampling": {
            "title": "Dynamic sampling",
            "description": "If all completions of a prompt (a group) get the same reward, the "
            "group gives no gradient. true: before the training step, such a group is replaced by "
            "a group for another prompt of the dataset (DAPO, section 3.2). This costs additional "
            "rollouts and reward calls, but no additional memory.",
            "type": "boolean",
            "default": False,
            "examples": [True],
        },
        "max_resample_times": {
            "title": "Max resample times",
            "description": "The maximum number of times that dynamic_sampling draws new groups for "
            "one generation batch. Groups whose rewards are still all equal are then used "
            "unchanged, and the run counts them.",
            "type": "integer",
            "minimum": 1,
            "default": 3,
            "examples": [3, 10],
            "x-unit": "rounds",
        },
        "curriculum": {
            "title": "Curriculum",
            "description": "true: a share of the prompts of each generation batch is chosen from "
            "the prompts that were drawn before. The probability of a prompt is proportional to "
            "the spread (standard deviation) of the rewards that its completions had. For a reward "
            "of 0 or 1, the spread is largest if half of the completions are right.",
            "type": "boolean",
            "default": False,
            "examples": [True],
        },
        "curriculum_share": {
            "title": "Curriculum share",
            "description": "The share of the prompts that curriculum chooses from the prompts that "
            "were drawn before. The other prompts are ones that were not drawn yet, as long as "
            "there are any.",
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "default": 0.5,
            "examples": [0.25, 0.5],
            "x-unit": "share of the prompts",
        },
    }


def field_docstrings(config: type) -> dict[str, str]:
    """Return the docstring text of each field of a config class. A class's text replaces those of
    its base classes.
    """
    texts: dict[str, str] = {}
    for base in config.__mro__:
        for match in PARAMETER.finditer((inspect.getdoc(base) or "") + "\n"):
            texts.setdefault(match[1], match[2])
    return texts


def field_schema(
    field: dataclasses.Field[Any], hint: Any, text: str | None, overlay: dict[str, Any]
) -> dict[str, Any]:
    """Return the schema of one field. ``hint`` is its type, ``text`` its docstring text, and
    ``overlay`` the content of grpo.overlay.json.
    """
    extra = dict(overlay["fields"].get(field.name, {}))
    refused = overlay["refused"].get(field.name)
    choices, rest = split_choices(text or field.metadata.get("help", "").replace("%%", "%"))
    schema: dict[str, Any] = {
        "title": field.name.replace("_", " ").capitalize(),
        "description": extra.pop("description", None) or strip_markup(rest),
    }
    if refused:
        key = refused["use"]
        named = key if not key or "." in key else f"the section {key}"
        use = f"Use {named} instead." if key else "Leave the key out."
        descriptions = f"Not allowed in a run file: {refused['why']}. {use}"
        return schema | {
            "description": descriptions,
            "deprecated": True,
            "deprecationMessage": descriptions,
            "doNotSuggest": True,
            "x-refused": refused,
            "not": {},
        }
    schema |= type_schema(hint, extra.pop("nullable", True))
    descriptions = extra.pop("told", None)
    choice_texts = dict(choices)
    names = (
        extra.pop("enum", None)
        or list(field.metadata.get("choices") or ())
        or enum_values(hint)
        or list(choice_texts)
    )
    if names and "array" not in schema["type"]:
        if "null" in schema["type"]:
            names = [*names, None]
        schema.pop("type")
        schema["enum"] = names
        descriptions = (
            {**choice_texts, **descriptions}
            if isinstance(descriptions, dict)
            else descriptions or choice_texts
        )
        if isinstance(descriptions, dict):
            descriptions = [
                descriptions.get(name, DEFAULT_DESCRIPTIONS.get(str(name), "")) for name in names
            ]
        schema["enumDescriptions"] = descriptions
        if not any(schema["enumDescriptions"]):
            del schema["enumDescriptions"]
    texts = extra.pop("enum_text", None)
    if texts:
        others = schema.pop("type")
        if isinstance(others, list):
            others = [name for name in others if name != "string"]
        schema["anyOf"] = [{"type": others, "minimum": extra.pop("minimum")}, {"enum": texts}]
    default = json_default(
        field.default if field.default is not dataclasses.MISSING else field.default_factory()
    )
    examples = extra.pop("examples", None) or names[:2] or [default]
    return schema | extra | {"default": default, "examples": examples}


def split_choices(text: str) -> tuple[list[tuple[Any, str]], str]:
    """Split a docstring text. Return the values that it lists as bullets, as pairs (value, text),
    and the rest of the text.
    """
    choices: list[tuple[list[Any], list[str]]] = []
    rest: list[str] = []
    for line in text.split("\n"):
        bullet = BULLET.match(line)
        if bullet:
            names = [name.strip('"') for name in re.findall(r"`([^`]+)`", bullet[1])]
            values = [{"True": True, "False": False}.get(name, name) for name in names]
            choices.append((values, [bullet[2]]))
        elif choices and line.strip():
            choices[-1][1].append(line)
        else:
            rest.append(line)
    return [
        (value, strip_markup(" ".join(lines))) for values, lines in choices for value in values
    ], "\n".join(rest)


def strip_markup(text: str) -> str:
    """Return a docstring text as one paragraph without markup. Links are written as text followed
    by the address in parentheses.
    """
    text = re.sub(r"\[(`?[^\]]*`?)\]\((https?://[^)]*)\)", r"\1 (\2)", text)
    text = re.sub(r"\[`~?(?:\w+\.)*([\w.]+)`\]", r"\1", text)
    text = " ".join(text.replace("`", "").replace('"', "'").split())
    return re.sub(r" ?(Supported|Possible) values are:$", "", text)


def type_schema(hint: Any, nullable: bool) -> dict[str, Any]:
    """Return the JSON types of a Python type (``hint``) as a part of a schema. A ``str`` beside a
    dict is left out, because TRL accepts it only for command lines.
    """
    members = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    kinds: list[str] = []
    items: dict[str, Any] = {}
    for member in members:
        origin = typing.get_origin(member) or member
        if origin is type(None):
            if nullable:
                kinds.append("null")
        elif origin is typing.Literal:
            kinds.append("boolean")
        elif origin in JSON_TYPES:
            kinds.append(JSON_TYPES[origin])
            if origin is list:
                inner = typing.get_args(member)[0]
                items = {"items": {"type": JSON_TYPES.get(inner, "string")}}
    if "object" in kinds and "string" in kinds:
        kinds.remove("string")
    if "number" in kinds and "integer" in kinds:
        kinds.remove("integer")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, **items}


def enum_values(hint: Any) -> list[Any]:
    """Return the values of the Enum in a type; an empty list if it contains no Enum."""
    for member in (hint, *typing.get_args(hint)):
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return [choice.value for choice in member]
    return []


def json_default(value: Any) -> Any:
    """Return a default value as a JSON value."""
    return value.value if isinstance(value, enum.Enum) else value


def render() -> str:
    """Return the text that run.schema.json should have."""
    schema = json.loads((FOLDER / "run.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["grpo"] = grpo_section()
    model = schema["properties"]["model"]["properties"]
    engine = schema_properties()
    for name in set(model) - {item.name for item in dataclasses.fields(ModelSection)}:
        del model[name]
    model.update(engine)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write run.schema.json, or with --check only report whether it is up to date. Return the exit
    code.
    """
    path = FOLDER / "run.schema.json"
    expected = render()
    if path.read_text(encoding="utf-8") == expected:
        return 0
    if "--check" in sys.argv[1:]:
        sys.stderr.write(
            "schemas/run.schema.json does not match the installed TRL or config/engine_settings: "
            "run `just schemas` to write it again\n"
        )
        return 1
    path.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
