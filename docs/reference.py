"""The reference pages of the documentation, made from what `envcheck explain` prints.

mkdocs calls ``on_files``; a test calls ``pages``. A rule, a check, a key, an exit code and a
symptom each have a page of their own, so that a finding can point there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import EXIT_CODES
from toolkit.base.symptoms import SYMPTOMS, TEXTS
from toolkit.config.explain import SECTIONS, all_keys, explain_key
from toolkit.config.importers.formats import TABLE_MODULES, load_table
from toolkit.config.importers.write import table_markdown
from toolkit.config.metrics import METRICS, TIMINGS
from toolkit.config.rules import all_rules
from toolkit.gpu.cards import CARDS
from toolkit.gpu.checks import checks_by_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from toolkit.base.symptoms import Symptom
    from toolkit.config.rules import Rule
    from toolkit.gpu.cards import Card
    from toolkit.gpu.checks import Check

FOLDER = "reference"


def on_files(files: Any, config: Any) -> Any:
    """The hook of mkdocs: adds the generated pages to the documentation."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - the test needs no mkdocs

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Path below docs/ -> the page in Markdown."""
    return dict(_pages())


def _pages() -> Iterator[tuple[str, str]]:
    rules, checks = (
        sorted(all_rules().values(), key=lambda rule: rule.id),
        list(checks_by_id().values()),
    )
    keys = dict(all_keys())
    yield _page_path("rules/index"), _rules_index(rules)
    yield from ((_page_path(f"rules/{rule.id}"), _rule_page(rule)) for rule in rules)
    yield _page_path("checks/index"), _checks_index(checks)
    yield from ((_page_path(f"checks/{check.id}"), _check_page(check)) for check in checks)
    yield _page_path("keys/index"), _keys_index(keys)
    yield from (
        (_page_path(f"keys/{key_name(name)}"), _key_page(name, keys[name])) for name in keys
    )
    yield _page_path("cards/index"), _cards_index()
    yield _page_path("exit-codes/index"), _exit_codes_index()
    yield from ((_page_path(f"exit-codes/{code}"), _exit_code_page(code)) for code in EXIT_CODES)
    yield from (
        (_page_path(f"import/{format_name}"), _import_page(format_name))
        for format_name in TABLE_MODULES
    )
    yield _page_path("metrics/index"), _metrics_index()
    yield _page_path("symptoms/index"), _symptoms_index()
    yield from (
        (_page_path(f"symptoms/{symptom.id}"), _symptom_page(symptom)) for symptom in SYMPTOMS
    )


def _page_path(name: str) -> str:
    return f"{FOLDER}/{name}.md"


def key_name(key: str) -> str:
    """A key as the name of a file: ``reward.functions[].name`` is ``reward.functions.name``."""
    return key.replace("[]", "")


def _escape(text: str) -> str:
    """Plain text as Markdown that shows the same characters."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _code_block(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```\n"


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _rule_link(name: str) -> str:
    return f"[{name}](../rules/{name}.md)"


def _key_link(name: str) -> str:
    return f"[`{name}`](../keys/{key_name(name)}.md)"


def _check_link(name: str) -> str:
    return f"[`{name}`](../checks/{name}.md)"


def _rule_page(rule: Rule) -> str:
    why = f"\n{_escape(rule.why)}\n" if rule.why else ""
    known = dict(all_keys())
    keys = [_key_link(key) if key in known else f"`{key}`" for key in rule.keys]
    return (
        f"# {rule.id}\n\n**{_escape(rule.summary)}** ({rule.severity})\n{why}\n"
        f"## Example of what it finds\n\n{_code_block(rule.example, 'yaml')}\n"
        f"## Fix\n\n{_code_block(rule.fix)}\n"
        + (f"## Keys\n\n{_bullets(keys)}\n" if keys else "")
        + f"In a terminal: `envcheck explain {rule.id}`.\n"
    )


def _rules_index(rules: list[Rule]) -> str:
    rows = "".join(
        f"| [{r.id}]({r.id}.md) | {r.severity} | {_escape(r.summary)} |\n" for r in rules
    )
    return (
        "# Rules\n\nWhat `envcheck validate` checks in a run file. An error stops a run; a warning"
        f" does not.\n\n| rule | severity | what it finds |\n| --- | --- | --- |\n{rows}"
    )


def _check_page(check: Check) -> str:
    return (
        f"# {check.id}\n\n**{_escape(check.title)}**\n\n{_escape(check.why)}\n\n## Fix\n\n"
        f"{_escape(check.remedy)}\n\nOnly this check: `envcheck check --only {check.id}`. In a"
        f" terminal: `envcheck explain {check.id}`.\n"
    )


def _checks_index(checks: list[Check]) -> str:
    rows = "".join(f"| [`{c.id}`]({c.id}.md) | {_escape(c.title)} |\n" for c in checks)
    return (
        "# Checks\n\nWhat `envcheck check` checks on a node. A verdict is ok, warn, fail or"
        f" unknown.\n\n| check | what must be true |\n| --- | --- |\n{rows}"
    )


def _key_page(name: str, schema: dict[str, Any]) -> str:
    lines = explain_key(name, schema).split("\n")
    rules = [rule for rule in all_rules().values() if name in rule.keys]
    body = "\n".join(lines[1:])
    body = body.split("\n\nRules:\n")[0].rstrip()
    listed = _bullets(f"{_rule_link(rule.id)}: {_escape(rule.summary)}" for rule in rules)
    return (
        f"# {_escape(name)}\n\n{_code_block(_dedent(body))}\n"
        + (f"## Rules about it\n\n{listed}\n" if rules else "")
        + f"In a terminal: `envcheck explain {name}`.\n"
    )


def _dedent(text: str) -> str:
    return re.sub(r"^  ", "", text, flags=re.MULTILINE)


def _keys_index(keys: dict[str, dict[str, Any]]) -> str:
    text = "# Keys\n\nEvery key of a run file, by section.\n"
    for section in ("extends", *SECTIONS):
        text += f"\n## {section}\n\n| key | meaning |\n| --- | --- |\n"
        for name, schema in keys.items():
            if name.partition(".")[0] == section and "x-refused" not in schema:
                first = schema["description"].split(". ")[0].rstrip(".")
                text += f"| [`{name}`]({key_name(name)}.md) | {_escape(first)} |\n"
    refused = [name for name, schema in keys.items() if "x-refused" in schema]
    links = ", ".join(f"[`{name}`]({key_name(name)}.md)" for name in refused)
    why = "Fields of TRL's GRPOConfig that the toolkit sets"
    return f"{text}\n## Not in a run file\n\n{why}: {links}.\n"


def _import_page(format_name: str) -> str:
    found = load_table(format_name)
    rows = table_markdown(format_name).partition("\n\n")[2]
    return (
        f"# From {_escape(found.title)}\n\nWhat `toolkit import` makes of each key. Print it with"
        f" `toolkit import --table {format_name}`.\n\n{rows}\n"
    )


def _metrics_index() -> str:
    tables = (("metrics.jsonl", METRICS), ("timings.jsonl", TIMINGS))
    return (
        "# Values in the logs of a run\n\nA value of an evaluation has the prefix `eval/`. In a"
        " terminal: `envcheck explain NAME`.\n"
    ) + "".join(
        f"\n## {file}\n\n| name | what it is |\n| --- | --- |\n"
        + "".join(f"| `{name}` | {_escape(text)} |\n" for name, text in values.items())
        for file, values in tables
    )


def _exit_code_page(code: int) -> str:
    symptoms = [one for one in SYMPTOMS if one.exit_code == code]
    listed = _bullets(f"[{_escape(one.title)}](../symptoms/{one.id}.md)" for one in symptoms)
    return f"# Exit code {code}\n\n**{_escape(EXIT_CODES[code])}**\n\n{_ACTIONS[code]}\n" + (
        f"\n## Symptoms with this code\n\n{listed}" if symptoms else ""
    )


_CODES = tuple(EXIT_CODES.items())
_ACTIONS = {
    0: "Nothing to do.",
    1: "Change the run file or the request: the message names the key and a fix. A scheduler must"
    " not retry: the same file fails again on every node.",
    2: "The command line is wrong, or a file cannot be read. A scheduler must not retry.",
    3: "The node is bad: the driver, a card or its memory. Take the node out of service and start"
    " the job elsewhere.",
    4: "Something that changes by itself is in the way, such as another process that holds GPU"
    " memory. Start the job again later, on any node.",
    5: "A value could not be read, so there is no verdict. With `--strict` this is a failure.",
    70: "The toolkit has a defect. The message names a report file: attach it to an issue.",
    75: "The run was stopped on purpose (a signal, a time limit) and wrote a checkpoint. Start the"
    " same command again: it resumes.",
}


def _exit_codes_index() -> str:
    rows = "".join(
        f"| [{code}]({code}.md) | {_escape(text)} |\n" for code, text in EXIT_CODES.items()
    )
    return (
        "# Exit codes\n\nAll commands use the same codes, so that a scheduler can act on them."
        f"\n\n| code | meaning |\n| --- | --- |\n{rows}"
    )


_CARD_SOURCES = {
    "read": "read on the card",
    "log": "printed in the log",
    "reserved": "NVML's total less what `nvidia-smi -q` calls reserved",
    "reported": "commonly reported; an address has NVML's total or an older driver's size",
    "alike": "as on the card of the same chip and memory",
    "computed": "NVML's total less the most that a driver reserves on cards of that size",
    "host": "a part of the host's memory",
}


def _cards_index() -> str:
    return (
        "# Cards\n\nThe cards that `--gpu` and `--require` know by name, and the slices of those"
        " that have MIG. `nvidia-smi` prints NVML's total; CUDA sees less, because the driver"
        " reserves a part, and the sizer counts with what CUDA sees. Any other card: `--gpu"
        " 24GiB:8.9`.\n\n| card | `--gpu` | NVML, MiB | CUDA, GiB | capability | where it is from |"
        f"\n| --- | --- | ---: | ---: | --- | --- |\n{''.join(map(_card_row, CARDS))}"
        "\n## MIG slices\n\n"
        f"| card | slices, GiB | from |\n| --- | --- | --- |\n{''.join(map(_slices_row, CARDS))}"
    )


def _card_row(card: Card) -> str:
    major, minor = card.compute_capability
    return (
        f"| {card.name} | `{card.aliases[0]}` | {card.total_bytes >> 20}"
        f" | {card.cuda_bytes / (1 << 30):.2f} | {major}.{minor}"
        f" | {_CARD_SOURCES[card.source]}{_address_links(card.addresses)} |\n"
    )


def _slices_row(card: Card) -> str:
    if not card.slices:
        return ""
    sizes = ", ".join(
        f"{name} {'about ' if source == 'computed' else ''}{size / (1 << 30):.2f}"
        for name, size, source in card.slices
    )
    return f"| {card.name} | {sizes} |{_address_links(card.slice_addresses)} |\n"


def _address_links(addresses: Iterable[str]) -> str:
    return "".join(f" [{number}]({one})" for number, one in enumerate(addresses, 1))


def _symptom_page(symptom: Symptom) -> str:
    texts = "\n".join(TEXTS[symptom.id])
    found = (
        f"Found before the start by {_finder_links(symptom.check)}."
        if symptom.has_check
        else f"Nothing finds it before the start: {_escape(symptom.check.removeprefix('none: '))}."
    )
    return (
        f"# {_escape(symptom.title)}\n\n## What to do\n\n{_escape(symptom.remedy)}\n\n"
        f"Exit code [{symptom.exit_code}](../exit-codes/{symptom.exit_code}.md). {found}"
        f"\n\n## Texts that mean it\n\n"
        "`{n}` is a number, `{w}` a word, `{..}` any text.\n\n" + _code_block(texts)
    )


def _finder_links(check: str) -> str:
    """Links to the rules and checks that a symptom names."""
    links = []
    for name in check.split(", "):
        if name in all_rules():
            links.append(_rule_link(name))
        elif name in checks_by_id():
            links.append(_check_link(name))
        else:
            links.append(f"`envcheck {name}`")
    return ", ".join(links)


def _symptoms_index() -> str:
    rows = "".join(
        f"| [{_escape(one.title)}]({one.id}.md) | {one.exit_code} |\n" for one in SYMPTOMS
    )
    return (
        "# Symptoms\n\nError texts that people meet, with their cause and the remedy. Paste a log"
        " into `envcheck explain -` to have it looked up.\n\n| symptom | exit code |\n| --- | --- |"
        f"\n{rows}"
    )
