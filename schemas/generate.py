"""Write two parts of run.schema.json: ``just schemas``. The grpo section comes from the installed
TRL's GRPOConfig, the engine options of the model section from ``config.engine_settings``.

Types, defaults and texts are TRL's own (dataclass fields, docstrings); ranges, units and
examples, and the fields that a run file may not set, are in grpo.overlay.json. ``--check``
writes nothing and fails when the file would change.
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
SAYS_ITSELF = {"True": "yes", "False": "no", "None": "as the library has it"}
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
    """The schema of the grpo section for the TRL that is installed."""
    import trl  # noqa: PLC0415 - it brings torch

    overlay = json.loads((FOLDER / "grpo.overlay.json").read_text(encoding="utf-8"))
    hints = typing.get_type_hints(trl.GRPOConfig)
    texts = docstrings(trl.GRPOConfig)
    properties = own_keys()
    for field in dataclasses.fields(trl.GRPOConfig):
        if field.init:
            properties[field.name] = one_field(
                field, hints[field.name], texts.get(field.name), overlay
            )
    unused = (set(overlay["fields"]) | set(overlay["refused"])) - set(properties)
    if unused:
        raise SystemExit(
            f"grpo.overlay.json names what TRL {trl.__version__} does not have: {sorted(unused)}"
        )
    return {
        "title": "GRPO training",
        "description": "The fields of TRL's GRPOConfig under TRL's names, and keys of the toolkit.",
        "$comment": f"Generated from trl {trl.__version__} (Apache-2.0); do not edit.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def own_keys() -> dict[str, Any]:
    """The keys that TRL 1.16 does not have. It removed max_prompt_length in 0.28, but too long
    prompts must be truncated.
    """
    return {
        "max_prompt_length": {
            "title": "Max prompt length",
            "description": "Longer prompts are cut from the left, and the run says how many were. "
            "null: max_seq_length less max_completion_length.",
            "type": ["integer", "null"],
            "minimum": 1,
            "default": None,
            "examples": [256, 1024],
            "x-unit": "tokens",
        },
        "dynamic_sampling": {
            "title": "Dynamic sampling",
            "description": "Groups whose rewards have no spread teach nothing. true: they are "
            "replaced by groups of other prompts of the data set before the step (DAPO, section "
            "3.2). Costs rollouts and reward calls, not memory.",
            "type": "boolean",
            "default": False,
            "examples": [True],
        },
        "max_resample_times": {
            "title": "Max resample times",
            "description": "How many times dynamic_sampling draws again for one generation batch. "
            "Groups that still have no spread are then trained on as they are, and counted.",
            "type": "integer",
            "minimum": 1,
            "default": 3,
            "examples": [3, 10],
            "x-unit": "rounds",
        },
        "curriculum": {
            "title": "Curriculum",
            "description": "true: a part of the prompts of each generation batch is chosen among "
            "those drawn before, in proportion to the spread of the rewards that they had. With a "
            "reward of 0 or 1 the spread is largest where half of the completions are right.",
            "type": "boolean",
            "default": False,
            "examples": [True],
        },
        "curriculum_share": {
            "title": "Curriculum share",
            "description": "The part of the prompts that curriculum chooses among those drawn "
            "before; the others were not drawn yet, as long as there are any.",
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "default": 0.5,
            "examples": [0.25, 0.5],
            "x-unit": "share of the prompts",
        },
    }


def docstrings(config: type) -> dict[str, str]:
    """The docstring text of each field of a config and its bases, the most derived first."""
    texts: dict[str, str] = {}
    for base in config.__mro__:
        for match in PARAMETER.finditer((inspect.getdoc(base) or "") + "\n"):
            texts.setdefault(match[1], match[2])
    return texts


def one_field(
    field: dataclasses.Field[Any], hint: Any, text: str | None, overlay: dict[str, Any]
) -> dict[str, Any]:
    """The schema of one field."""
    more = dict(overlay["fields"].get(field.name, {}))
    refused = overlay["refused"].get(field.name)
    choices, rest = choices_of(text or field.metadata.get("help", "").replace("%%", "%"))
    schema: dict[str, Any] = {
        "title": field.name.replace("_", " ").capitalize(),
        "description": more.pop("description", None) or clean(rest),
    }
    if refused:
        use = f"use {refused['use']}" if refused["use"] else "leave it out"
        told = f"Not in a run file: {refused['why']}; {use}."
        return schema | {
            "description": told,
            "deprecated": True,
            "deprecationMessage": told,
            "doNotSuggest": True,
            "x-refused": refused,
            "not": {},
        }
    schema |= shape(hint, more.pop("nullable", True))
    told = more.pop("told", None)
    known = dict(choices)
    names = (
        more.pop("enum", None)
        or list(field.metadata.get("choices") or ())
        or enum_of(hint)
        or list(known)
    )
    if names and "array" not in schema["type"]:
        if "null" in schema["type"]:
            names = [*names, None]
        schema.pop("type")
        schema["enum"] = names
        told = {**known, **told} if isinstance(told, dict) else told or known
        if isinstance(told, dict):
            told = [told.get(name, SAYS_ITSELF.get(str(name), "")) for name in names]
        schema["enumDescriptions"] = told
        if not any(schema["enumDescriptions"]):
            del schema["enumDescriptions"]
    texts = more.pop("enum_text", None)
    if texts:
        others = schema.pop("type")
        if isinstance(others, list):
            others = [name for name in others if name != "string"]
        schema["anyOf"] = [{"type": others, "minimum": more.pop("minimum")}, {"enum": texts}]
    default = plain(
        field.default if field.default is not dataclasses.MISSING else field.default_factory()
    )
    examples = more.pop("examples", None) or names[:2] or [default]
    return schema | more | {"default": default, "examples": examples}


def choices_of(text: str) -> tuple[list[tuple[Any, str]], str]:
    """The values that a docstring lists as bullets, each with its text; and the rest."""
    found: list[tuple[list[Any], list[str]]] = []
    rest: list[str] = []
    for line in text.split("\n"):
        bullet = BULLET.match(line)
        if bullet:
            names = [name.strip('"') for name in re.findall(r"`([^`]+)`", bullet[1])]
            values = [{"True": True, "False": False}.get(name, name) for name in names]
            found.append((values, [bullet[2]]))
        elif found and line.strip():
            found[-1][1].append(line)
        else:
            rest.append(line)
    return [
        (value, clean(" ".join(said))) for values, said in found for value in values
    ], "\n".join(rest)


def clean(text: str) -> str:
    """Docstring text as one plain paragraph: no markup, no links, first sentence upper case."""
    text = re.sub(r"\[(`?[^\]]*`?)\]\((https?://[^)]*)\)", r"\1 (\2)", text)
    text = re.sub(r"\[`~?(?:\w+\.)*([\w.]+)`\]", r"\1", text)
    text = " ".join(text.replace("`", "").replace('"', "'").split())
    return re.sub(r" ?(Supported|Possible) values are:$", "", text)


def shape(hint: Any, nullable: bool) -> dict[str, Any]:
    """JSON types of a Python type; str beside an enum or a dict is how a command line writes it,
    so it is left out.
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


def enum_of(hint: Any) -> list[Any]:
    """The values of the Enum in a type, if there is one."""
    for member in (hint, *typing.get_args(hint)):
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return [choice.value for choice in member]
    return []


def plain(value: Any) -> Any:
    """A default as a JSON value."""
    return value.value if isinstance(value, enum.Enum) else value


def render() -> str:
    """run.schema.json as it should be."""
    schema = json.loads((FOLDER / "run.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["grpo"] = grpo_section()
    model = schema["properties"]["model"]["properties"]
    engine = schema_properties()
    for name in set(model) - {item.name for item in dataclasses.fields(ModelSection)}:
        del model[name]
    model.update(engine)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the schema; with --check only report whether it is up to date."""
    path = FOLDER / "run.schema.json"
    wanted = render()
    if path.read_text(encoding="utf-8") == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        sys.stderr.write(
            "schemas/run.schema.json differs from the installed TRL or from config/engine_settings:"
            " run `just schemas`\n"
        )
        return 1
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
