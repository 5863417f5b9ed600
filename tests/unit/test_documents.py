"""The documents name files, modules and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from toolkit.cli.envcheck import cli as envcheck
from toolkit.cli.train import cli as toolkit

ROOT = Path(__file__).parents[2]
PACKAGES = "base|cli|config|engine|gpu|policy|sizing|train"
PATHS = re.compile(
    rf"(?<![\w/.])(?:toolkit/)?((?:{PACKAGES})(?:/\w+)+)(\.py)?(?:\.([A-Za-z_]\w*))?"
)
UPSTREAM = {"config/lora.py"}  # a file of vLLM that config/libraries reads
DOCUMENTS = [
    "ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "SECURITY.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]  # fmt: skip


def missing_paths(text: str) -> list[str]:
    """The paths below toolkit/ in ``text`` that do not exist or do not contain the given name."""
    found = []
    for path, suffix, name in PATHS.findall(text):
        place = ROOT / "toolkit" / path
        module = place.with_suffix(".py")
        if not suffix and name and (ROOT / "toolkit" / f"{path}.{name}").is_file():
            continue  # the name is the suffix of a file that is not Python
        if not (place.is_dir() and not suffix) and not module.is_file():
            found.append(path + suffix)
        elif (
            name
            and name != "py"
            and not re.search(
                rf"\b{name}\b",
                (module if module.is_file() else place / "__init__.py").read_text(encoding="utf-8"),
            )
        ):
            found.append(f"{path}.{name}")
    return [path for path in found if path not in UPSTREAM]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_what_exists(name: str) -> None:
    assert missing_paths((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("package", PACKAGES.split("|"))
def test_a_docstring_or_comment_names_what_exists(package: str) -> None:
    found = {}
    for file in sorted((ROOT / "toolkit" / package).rglob("*.py")):
        text = "\n".join(
            line for line in file.read_text(encoding="utf-8").split("\n") if "import" not in line
        )
        if gone := missing_paths(text):
            found[str(file.relative_to(ROOT))] = gone
    assert found == {}


def test_the_check_finds_a_missing_file_and_a_missing_name() -> None:
    text = "see engine/no_such_file.py, config/resolved.no_such_name and train/step/packing"
    assert missing_paths(text) == ["engine/no_such_file.py", "config/resolved.no_such_name"]


def unknown_options(text: str) -> list[str]:
    """The options in the ``envcheck`` and ``toolkit`` commands of ``text`` that do not exist."""
    unknown = []
    for program, name, arguments in re.findall(
        r"\b(envcheck|toolkit) ([a-z]+)((?: [^`\n\"|;&]*)?)[`\n\"]", text
    ):
        group = {"envcheck": envcheck, "toolkit": toolkit}[program]
        command = group.get_command(click.Context(group), name)
        if command is None:
            continue  # prose, for example "toolkit and"
        known = {"--help", "--debug"}
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
        options = re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", arguments)
        unknown += [f"{program} {name} {option}" for option in options if option not in known]
    return unknown


def test_every_option_that_a_text_advises_exists() -> None:
    files = [
        *(ROOT / "toolkit").rglob("*.py"),
        *(ROOT / "schemas").glob("*.json"),
        *(ROOT / name for name in DOCUMENTS),
    ]
    unknown = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        # A message may be written as several strings, one per line.
        text = re.sub(r'"\s*\n\s*f?"', "", text)
        if options := unknown_options(text):
            unknown[str(file.relative_to(ROOT))] = options
    assert unknown == {}


def test_an_option_that_does_not_exist_is_found() -> None:
    text = "run `envcheck check --deep` or `envcheck size --write`"
    assert unknown_options(text) == ["envcheck check --deep"]
