"""Write the texts of `envcheck explain`, which explain rules, run file keys, metrics and exit
codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import nearest
from toolkit.base.errors import EXIT_CODES, InputError
from toolkit.config import metrics
from toolkit.config.message_text import describe_schema, show_value, wrap_text
from toolkit.config.rules import all_rules
from toolkit.config.schemas import find_schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from toolkit.config.rules import Rule

SECTIONS = ("model", "lora", "dataset", "environment", "tools", "reward", "grpo", "runtime")


def explain(topic: str) -> str | None:
    """Return the explanation of ``topic`` as text; None if there is no such explanation.

    ``topic`` is the id of a rule, the name of a key or metric, an exit code, or one of the topics
    ``exit-codes``, ``rules`` and ``metrics``. For a key or metric, the last part of the name is
    enough.
    """
    word = topic.strip()
    if word == "exit-codes":
        return exit_codes()
    if word.isdecimal() and int(word) in EXIT_CODES:
        return f"exit code {int(word)}: {EXIT_CODES[int(word)]}"
    if word == "rules":
        return rule_list()
    if word == "metrics":
        return metrics.explain_all()
    rule = all_rules().get(word.upper())
    if rule is not None:
        return explain_rule(rule)
    texts = (explain_keys(word), metrics.explain_metric(word))
    return "\n\n".join(text for text in texts if text is not None) or None


def unknown_topic_error(topic: str, extra_names: Sequence[str] = ()) -> InputError:
    """Return the error for the word ``topic``, which has no explanation. The fix of the error
    suggests the most similar word that has an explanation. ``extra_names`` are additional words
    that may be suggested.
    """
    names = [*all_rules(), *(name for name, _ in all_keys()), *extra_names, *metrics.names()]
    names += [name.rpartition(".")[2] for name, _ in all_keys()]
    names += ["exit-codes", "rules", "metrics"]
    suggestion = nearest(topic, names)
    fix = (
        f"did you mean {suggestion}?"
        if suggestion
        else "list the rules with `envcheck explain rules`"
    )
    return InputError(f"there is no rule, key, metric or topic named {topic!r}", fix=fix)


def exit_codes() -> str:
    """Return the table of exit codes as text."""
    return "\n".join(
        [
            "Exit codes, on which a scheduler can act:",
            *(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        ]
    )


def rule_list() -> str:
    """Return a text with one line per rule."""
    return "\n".join(
        f"{rule.id:<10} {rule.severity:<8} {rule.summary}"
        for rule in sorted(all_rules().values(), key=lambda one: one.id)
    )


def explain_rule(rule: Rule) -> str:
    """Return the full explanation of a rule as text."""
    lines = [f"{rule.id} ({rule.severity})", f"  {rule.summary}"]
    if rule.why:
        lines += ["", *wrap_text(rule.why)]
    lines += [
        "",
        "An example that the rule reports:",
        *(f"    {line}" for line in rule.example.split("\n")),
    ]
    lines += ["", "Fix:", *(f"    {line}" for line in rule.fix.split("\n"))]
    if rule.keys:
        lines += ["", "Keys:", *wrap_text(", ".join(rule.keys), indent="    ")]
    return "\n".join(lines)


def all_keys() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and schema of every section and key of a run file, including the keys of each
    reward function.
    """
    properties = find_schema("run")["properties"]
    yield "extends", properties["extends"]
    for section in SECTIONS:
        yield section, properties[section]
        for name, schema in properties[section]["properties"].items():
            yield f"{section}.{name}", schema
    functions = properties["reward"]["properties"]["functions"]["items"]["properties"]
    for name, schema in functions.items():
        yield f"reward.functions[].{name}", schema


def explain_keys(key: str) -> str | None:
    """Return the explanation of the key ``key`` as text; None if there is no such key. If
    ``key`` is not a full name, all keys whose last part is ``key`` are explained.
    """
    matches = [(name, schema) for name, schema in all_keys() if name == key]
    if not matches:
        matches = [(name, schema) for name, schema in all_keys() if name.rpartition(".")[2] == key]
    return "\n\n".join(explain_key(name, schema) for name, schema in matches) or None


def explain_key(name: str, schema: dict[str, Any]) -> str:
    """Return the explanation of one key as text: its meaning, type, default, unit and examples, and
    the rules that check it.
    """
    lines = [name, *wrap_text(schema["description"])]
    if "x-refused" in schema:
        return "\n".join(lines)
    if "properties" in schema:
        lines += ["", "Keys:", *wrap_text(", ".join(_settable_keys(schema)), indent="    ")]
    else:
        lines += ["", f"  type:     {_describe_type(schema)}"]
        if "default" in schema:
            lines.append(f"  default:  {show_value(schema['default'])}")
        else:
            lines.append("  default:  none; the key is required")
        if "x-unit" in schema:
            lines.append(f"  unit:     {schema['x-unit']}")
        if schema.get("examples"):
            lines.append(f"  examples: {', '.join(map(show_value, schema['examples']))}")
        lines += _describe_choices(schema)
    rules = [rule for rule in all_rules().values() if name in rule.keys]
    if rules:
        lines += ["", "Rules:", *(f"    {rule.id}  {rule.summary}" for rule in rules)]
    return "\n".join(lines)


def _settable_keys(schema: dict[str, Any]) -> list[str]:
    return [
        name for name, key_schema in schema["properties"].items() if "x-refused" not in key_schema
    ]


def _describe_type(schema: dict[str, Any]) -> str:
    branches = schema.get("anyOf", [schema])
    words = [describe_schema(branch) or "anything" for branch in branches]
    limits = [
        f"{word} {show_value(branch[keyword])}"
        for branch in branches
        for keyword, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "less than"),
        )
        if keyword in branch
    ]
    kinds = [branch.get("type", []) for branch in branches]
    nullable = any("null" in ([kind] if isinstance(kind, str) else kind) for kind in kinds)
    text = " or ".join(word for word in words if word != "null")
    return ", ".join([text, *limits]) + (" (or null)" if nullable else "")


def _describe_choices(schema: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for branch in (schema, *schema.get("anyOf", ())):
        for value, text in zip(
            branch.get("enum", ()), branch.get("enumDescriptions", ()), strict=False
        ):
            lines += [f"    {show_value(value)}", *wrap_text(text, indent="        ")]
        if "const" in branch and "description" in branch:
            lines += [
                f"    {show_value(branch['const'])}",
                *wrap_text(branch["description"], indent="        "),
            ]
    return ["", "Values:", *lines] if lines else []
