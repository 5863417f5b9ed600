"""Every rule, check, key, exit code and symptom has a page, and there are no other pages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.base.errors import EXIT_CODES
from toolkit.base.symptoms import SYMPTOMS
from toolkit.config.explain import all_keys
from toolkit.config.importers.formats import TABLE_MODULES
from toolkit.config.rules import all_rules
from toolkit.gpu.checks import checks_by_id

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def load(name: str) -> Any:
    """Import a module of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    made: dict[str, str] = load("reference").pages()
    return made


def test_every_id_has_a_page_and_every_page_its_id(pages: dict[str, str]) -> None:
    expected = {
        "rules": set(all_rules()),
        "checks": set(checks_by_id()),
        "keys": {name.replace("[]", "") for name, _ in all_keys()},
        "exit-codes": {str(code) for code in EXIT_CODES},
        "symptoms": {symptom.id for symptom in SYMPTOMS},
        "import": set(TABLE_MODULES),
        "cards": set(),
        "metrics": set(),
    }
    found: dict[str, set[str]] = {}
    for path in pages:
        _, kind, name = path.removesuffix(".md").split("/")
        found.setdefault(kind, set()).add(name)
    assert {kind: names - {"index"} for kind, names in found.items()} == expected
    assert all("index" in names for kind, names in found.items() if kind != "import")


def test_every_link_between_pages_has_a_target(pages: dict[str, str]) -> None:
    for path, text in pages.items():
        folder = Path(path).parent
        for target in re.findall(r"\]\(([^)#]+\.md)\)", text):
            parts: list[str] = []
            for part in (folder / target).parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            assert "/".join(parts) in pages, f"{path} links to {target}"


def test_a_rule_page_has_what_explain_prints(pages: dict[str, str]) -> None:
    rule = all_rules()["GRPO001"]
    page = pages["reference/rules/GRPO001.md"]
    assert rule.example in page
    assert rule.fix in page
    assert "../keys/" in page


def test_the_sizing_page_shows_the_current_output() -> None:
    shown = (DOCS / "sizing" / "output.txt").read_text(encoding="utf-8")
    current = load("pictures").sizing_output()
    assert current.split() == shown.split(), "run `just docs-pictures size`"


def test_the_picture_of_the_progress_matches_the_shown_output() -> None:
    pictures = load("pictures")
    text = (pictures.PICTURES / "demo.txt").read_text(encoding="utf-8")
    for suffix, columns in pictures.COLUMNS.items():
        drawn = (pictures.PICTURES / f"progress{suffix}.svg").read_text(encoding="utf-8")
        assert drawn == pictures.progress_drawing(text, columns), "run `just docs-pictures size`"
        assert all(len(line) <= columns for line in pictures.progress_lines(text, columns))


@pytest.mark.slow
def test_the_documentation_builds_strictly(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "rules" / "GRPO001" / "index.html").is_file()


def test_findings_point_to_their_page(tmp_path: Path, pages: dict[str, str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {model_name: x/y}\ngrpo: {num_generations: 1}\n")
    environ = {**os.environ, "TOOLKIT_DOCS_URL": "https://docs.example.org/toolkit/"}
    command = [Path(sys.executable).with_name("envcheck"), "validate", file]

    def output(form: str, environ: dict[str, str]) -> str:
        words = [*command, "--format", form]
        return subprocess.run(
            words, env=environ, capture_output=True, text=True, check=False
        ).stdout

    text = output("text", environ)
    linked = set(re.findall(r"see: https://docs\.example\.org/toolkit/(\S+)/$", text, re.MULTILINE))
    assert linked
    assert {f"{page}.md" for page in linked} <= set(pages)
    rules = json.loads(output("sarif", environ))["runs"][0]["tool"]["driver"]["rules"]
    assert all(rule["helpUri"].endswith(f"/reference/rules/{rule['id']}/") for rule in rules)
    without = {name: value for name, value in os.environ.items() if name != "TOOLKIT_DOCS_URL"}
    assert "see: " not in output("text", without)
    assert "helpUri" not in output("sarif", without)
