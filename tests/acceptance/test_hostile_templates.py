"""Hostile chat templates (endless, of unlimited output, invalid, or with code), given to every
command that may read one.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from spoiled_world import ENVCHECK, command_environment, make_model, make_world, run_commands

pytestmark = pytest.mark.slow
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loops": LOOP,
    "explodes": "{{ messages[0].role * 10**12 }}",
    "doubles": "{% set ns = namespace(x='ab') %}{% for a in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is long": "{{ 'x' }}" * 200_000,
    "is nested": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "is no template": "{% for %}",
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{% include '/etc/passwd' %}{% import 'os' as os %}",
    "reads": "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
}
SCORE = """\
def score(completions, **kwargs):
    return [float(len(set(chat[-1]["content"]))) for chat in completions]
"""
COMMANDS = {
    "validate": ("envcheck", "validate", "run.yaml"),
    "size": ("envcheck", "size", "run.yaml", "--gpu", "H100"),
    "dry run": ("toolkit", "train", "run.yaml", "--dry-run"),
    "train": ("toolkit", "train", "run.yaml"),
    "generate": ("toolkit", "generate", "done", "hi", "--chat", "--max-tokens", "2"),
    "export": ("toolkit", "export", "done", "--to", "exported"),
}
NAMED = ("chat template",)
QUIET = ("validate", "size", "dry run", "export")  # these commands render no chat


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A folder with a chat model, a chat dataset and a finished run in ``done``."""
    root = tmp_path_factory.mktemp("templates")
    make_model(root)
    from tiny_llama import make_tiny

    folder = make_world(root / "world", root / "model", dataset={"prompt": "messages"})
    (folder / "model").unlink()
    make_tiny(folder / "model", chat=True)
    row = {"messages": [{"role": "user", "content": "1+2="}], "answer": "3"}
    (folder / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (folder / "mine.py").write_text(SCORE)
    result = run(folder, "toolkit", "train", "run.yaml", "--output-dir", "done")
    assert result.returncode == 0, result.stderr
    return folder


def run(folder, *words):
    """Run a command; ``toolkit`` runs in a forked process, which saves the imports."""
    if words[0] == "toolkit":
        return run_commands([{"folder": folder, "arguments": list(words[1:]), "limit_s": 120}])[0]
    return subprocess.run(
        [ENVCHECK, *words[1:]],
        cwd=folder,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_with_every_command(chats, tmp_path, name):
    folder = tmp_path / "world"
    shutil.copytree(chats, folder)
    result = folder / "done" / "config.json"
    result.write_text(result.read_text().replace(str(chats), str(folder)))
    for place in (folder / "model", folder / "done" / "adapter"):
        (place / "chat_template.jinja").write_text(TEMPLATES[name])
    for command, words in COMMANDS.items():
        shown = run(folder, *words)
        print(command, shown.returncode, shown.stderr[:300])
        assert shown.returncode in ((0, 1) if command in QUIET else (1, 2)), (command, shown.stderr)
        assert "Traceback" not in shown.stderr, command
        assert not (folder / "pwned").exists()
        if command not in QUIET:
            assert shown.stderr.count("error: ") == 1, (command, shown.stderr)
            # A template that ends within the time limit can still render a prompt that is too long.
            reasons = ("chat template", "has 200000 tokens") if name == "is long" else NAMED
            assert any(reason in shown.stderr for reason in reasons), (command, shown.stderr)
