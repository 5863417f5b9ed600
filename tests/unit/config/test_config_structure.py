"""The structure check accepts what the jsonschema library accepts. Its findings have messages and
positions.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.config.document_loader import parse_source
from toolkit.config.schemas import find_schema, schema_names
from toolkit.config.source import Source
from toolkit.config.structure import check_structure

# KEYWORDS are the keywords that the structure check reads. ANNOTATIONS do not restrict a value.
KEYWORDS = frozenset(
    [
        "type",
        "enum",
        "const",
        "anyOf",
        "not",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "minItems",
        "uniqueItems",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minLength",
        "pattern",
    ]
)
ANNOTATIONS = frozenset(
    [
        "$schema",
        "$id",
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "enumDescriptions",
        "deprecated",
        "deprecationMessage",
        "doNotSuggest",
        "x-unit",
        "x-rule",
        "x-refused",
    ]
)
SCHEMA = find_schema("run")


def schemas_in(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema and all schemas inside it."""
    found = [schema]
    for below in (*schema.get("properties", {}).values(), *schema.get("anyOf", ())):
        found += schemas_in(below)
    if isinstance(schema.get("items"), dict):
        found += schemas_in(schema["items"])
    return found


def test_the_checker_supports_every_keyword_of_the_schema() -> None:
    used = {keyword for schema in schemas_in(SCHEMA) for keyword in schema}
    assert used <= KEYWORDS | ANNOTATIONS


@pytest.mark.parametrize("name", schema_names())
def test_every_schema_is_a_valid_json_schema(name: str) -> None:
    schema = find_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"]


def test_every_key_has_a_description() -> None:
    """A key has a title, a description, examples, and a default unless it is required. A number has
    a unit, and each choice has a description.
    """
    for owner in schemas_in(SCHEMA):
        for name, schema in owner.get("properties", {}).items():
            assert schema["title"], name
            assert schema["description"], name
            if "x-refused" in schema or "properties" in schema:
                continue
            assert "default" in schema or name in owner.get("required", ()), name
            assert schema["examples"], name
            kinds = [one.get("type", []) for one in (schema, *schema.get("anyOf", ()))]
            flat = {kind for one in kinds for kind in ([one] if isinstance(one, str) else one)}
            assert not flat & {"integer", "number"} or schema.get("x-unit"), name
            for branch in (schema, *schema.get("anyOf", ())):
                if "enum" in branch and branch["enum"] != ["auto"]:
                    assert len(branch["enumDescriptions"]) == len(branch["enum"]), name
                    assert all(branch["enumDescriptions"]), name
            validator = jsonschema.Draft202012Validator(schema)
            for example in (*schema["examples"], schema.get("default", schema["examples"][0])):
                if name not in ("extends", "$schema"):
                    assert validator.is_valid(example), (name, example)


def test_schema_defaults_are_those_of_the_config() -> None:
    import dataclasses

    from toolkit.config import run_config

    sections = {
        "model": run_config.ModelSection, "lora": run_config.LoraSection, 
        "dataset": run_config.DatasetSection,
        "environment": run_config.EnvironmentSection, "tools": run_config.ToolsSection,
        "runtime": run_config.RuntimeSection,
    }  # fmt: skip
    for section, kind in sections.items():
        properties = SCHEMA["properties"][section]["properties"]
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        assert set(properties) == set(fields)
        for name, default in fields.items():
            if default is not dataclasses.MISSING:
                plain = list(default) if isinstance(default, tuple) else default
                assert properties[name]["default"] == plain, name


def checker_accepts(instance: Any) -> bool:
    """Whether the structure check finds no invalid value. If a schema has x-rule, a rule reports a
    value out of range, so the check has only an invalid path and no finding.
    """
    document = parse_source(Source("run", json.dumps(instance), Path("/"), None, "json"))
    outcome = check_structure(document.root, SCHEMA)
    return not outcome.findings and not outcome.invalid_paths and not document.findings


def strict_enum(_: Any, values: list[Any], instance: Any, __: Any) -> Any:
    if not any(type(value) is type(instance) and value == instance for value in values):
        yield jsonschema.ValidationError("not one of them")


def jsonschema_accepts(instance: Any) -> bool:
    """Whether the jsonschema library accepts the instance. The library is made stricter: 8.0 is not
    an integer, and 8.0 is not equal to an 8 in an enum.
    """
    is_integer = lambda _, value: type(value) is int  # noqa: E731
    checker = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer)
    kind = jsonschema.validators.extend(
        jsonschema.Draft202012Validator, {"enum": strict_enum}, type_checker=checker
    )
    return bool(kind(SCHEMA).is_valid(instance))


BASE_RUN = {
    "model": {"model_name": "a/b"},
    "lora": {"r": 8, "target_modules": ["q_proj"]},
    "dataset": {"path": "x.jsonl"},
    "reward": {"functions": [{"name": "exact_match", "weight": 1, "options": {"tag": "answer"}}]},
    "grpo": {"beta": 0.1, "loss_type": "grpo", "bf16": None},
    "runtime": {"allow_code": ["a.b"]},
}
KEYS = sorted(
    {(section, key) for section in BASE_RUN
     for key, schema in SCHEMA["properties"][section]["properties"].items()
     if "x-refused" not in schema}
)  # fmt: skip
UNKNOWN_PATHS = [("grpo", "unknown"), ("zzz",), ("lora",)]
REFUSED_KEYS = [
    n for n, s in SCHEMA["properties"]["grpo"]["properties"].items() if "x-refused" in s
]
EXAMPLES = [
    value
    for schema in schemas_in(SCHEMA)
    for value in (*schema.get("examples", ()), *schema.get("enum", ()))
]
VALUES = (
    st.none() | st.booleans() | st.integers(-2, 2000)
    | st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0, 2.0, 8.0])
    | st.sampled_from(["", "auto", "x", "none", "a-b", "DAPO"]) | st.sampled_from(EXAMPLES)
    | st.lists(st.sampled_from(["q_proj", "q_proj", 1, None, "x y"]), max_size=3)
    | st.dictionaries(st.sampled_from(["name", "weight", "zzz"]),
                      st.integers(0, 1) | st.text(max_size=2), max_size=2)
)  # fmt: skip


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from([*KEYS, *UNKNOWN_PATHS]), VALUES),
        max_size=3,
    )
)
def test_the_checker_agrees_with_jsonschema(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    instance: dict[str, Any] = copy.deepcopy(BASE_RUN)
    for path, value in changes:
        holder = instance
        for part in path[:-1]:
            if not isinstance(holder.get(part), dict):
                return
            holder = holder[part]
        holder[path[-1]] = value
    assert checker_accepts(instance) == jsonschema_accepts(instance)


@pytest.mark.parametrize(
    "name", [n for n, s in SCHEMA["properties"]["grpo"]["properties"].items() if "x-refused" in s]
)
def test_a_refused_key_is_refused_by_the_schema_too(name: str) -> None:
    assert not jsonschema_accepts({**BASE_RUN, "grpo": {name: True}})


def test_unknown_references_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A $ref to another document is never fetched. The schemas of the toolkit have no such $ref."""
    import urllib.request

    from referencing.exceptions import Unresolvable

    from toolkit.config import validate

    for name in schema_names():
        refs = re.findall(r'"\$ref": ?"([^"]+)"', json.dumps(find_schema(name)))
        assert all(ref.startswith("#") for ref in refs), name

    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("a schema was requested from the network")

    monkeypatch.setattr(urllib.request, "urlopen", fetched)
    monkeypatch.setattr(validate, "find_schema", lambda _: {"$ref": "https://example.org/x.json"})
    with pytest.raises(Unresolvable):
        validate.check_instance({}, "run")
