"""SECURITY.md names tests that exist, and no module of the package executes data as code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "toolkit").rglob("*.py"))
PROMISES = (ROOT / "SECURITY.md").read_text()
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(tests/[^`]+)`", PROMISES))))
def test_every_named_test_exists(named: str) -> None:
    path, _, function = named.partition("::")
    source = (ROOT / path).read_text()
    assert not function or f"\ndef {function}(" in source


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PROMISES.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == 12
    assert all("`tests/" in row for row in rows)


def _forbidden_call(node: ast.AST) -> str | None:
    """The forbidden operation of a node as text; None for a node that is allowed."""
    if isinstance(node, ast.Import):
        pickle_modules = PICKLING & {alias.name.split(".")[0] for alias in node.names}
        return f"imports {pickle_modules}" if pickle_modules else None
    if isinstance(node, ast.ImportFrom):
        return f"imports {node.module}" if (node.module or "").split(".")[0] in PICKLING else None
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    arguments = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
    if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
        return f"calls {called}"
    if called == "torch.load" and arguments.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    if arguments.get("shell") == "True" or arguments.get("trust_remote_code") == "True":
        return f"calls {called} with {arguments}"
    if arguments.get("allow_pickle") == "True":
        return f"calls {called} with allow_pickle"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_executes_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = [(node.lineno, wrong) for node in ast.walk(tree) if (wrong := _forbidden_call(node))]
    assert calls == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "eval(x)", "torch.load(f)", "run(c, shell=True)",
     "f(trust_remote_code=True)", "np.load(f, allow_pickle=True)", "import a, marshal.x"],
)  # fmt: skip
def test_the_scan_finds_forbidden_calls(source: str) -> None:
    assert any(_forbidden_call(node) for node in ast.walk(ast.parse(source)))
