"""``toolkit import`` converts files of other tools to exactly the expected run files, and executes
nothing of those files.

``tests/fixtures/foreign`` has a synthetic file for each way in which a tool is used. Its folder
``expected`` has the run file for each of them. ``OUTCOMES`` has for each file the format, the exit
code and the rules of the errors in the written run file. After an intended change, run
``TOOLKIT_REWRITE_EXPECTED=1 pytest tests/acceptance/test_import_config.py`` to write the expected
files again, and read the diff.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from toolkit.cli.import_config import import_config
from toolkit.cli.validate import validate
from toolkit.config.document_loader import load_document
from toolkit.config.importers.formats import guess_format, load_table, read_foreign_config
from toolkit.config.importers.mapping import later

FOREIGN = Path(__file__).parents[1] / "fixtures" / "foreign"
EXPECTED = FOREIGN / "expected"
FILES = sorted(path for path in FOREIGN.iterdir() if path.is_file())
UNREADABLE = sorted((FOREIGN / "unreadable").iterdir())
NO_DATA, NO_REWARD, NO_MODEL = "DATA009", "GRPO012", "KEY002"
OUTCOMES: dict[str, tuple[str, int, set[str]]] = {
    "axolotl-async.yaml": ("axolotl", 1, {"REWARD001"}),
    "axolotl-dpo.yaml": ("axolotl", 1, {"GRPO001", NO_REWARD}),
    "axolotl-full.yaml": ("axolotl", 1, {NO_DATA, NO_REWARD}),
    "axolotl-gsm8k.yaml": ("axolotl", 1, {"REWARD001"}),
    "axolotl-merge-keys.yaml": ("axolotl", 1, {NO_DATA, NO_REWARD}),
    "axolotl-qlora.yml": ("axolotl", 1, {"DATA005", NO_REWARD}),
    "notebook-computed.ipynb": ("script", 1, {NO_DATA, "GRPO001", NO_REWARD, NO_MODEL}),
    "notebook-magics.ipynb": ("script", 1, {NO_DATA, NO_REWARD, NO_MODEL}),
    "notebook-qwen.ipynb": ("script", 1, {NO_DATA, "REWARD001"}),
    "notebook-two-configs.ipynb": ("script", 1, {NO_DATA, NO_REWARD}),
    "notebook-version3.ipynb": ("script", 1, {NO_DATA, NO_REWARD, NO_MODEL}),
    "notebook-vision.ipynb": ("script", 1, {NO_DATA, NO_REWARD}),
    "prime-rl-old.toml": ("prime-rl", 1, {NO_DATA, NO_REWARD}),
    "prime-rl-orchestrator.toml": ("prime-rl", 1, {NO_DATA, NO_REWARD}),
    "prime-rl-trainer.toml": ("prime-rl", 1, {NO_DATA, NO_REWARD}),
    "prime-rl.sh": ("prime-rl", 1, {NO_DATA, NO_REWARD}),
    "prime-rl.toml": ("prime-rl", 1, {NO_DATA, NO_REWARD}),
    "script-computed.py": ("script", 1, {NO_DATA, "REWARD001"}),
    "script-main.py": ("script", 1, {"REWARD001"}),
    "script-parser.py": ("script", 1, {NO_DATA, NO_REWARD, NO_MODEL}),
    "script-tools.py": ("script", 1, {NO_DATA, NO_REWARD}),
    "script-trl.py": ("script", 1, {"REWARD001"}),
    "swift-args.json": ("ms-swift", 0, set()),
    "swift-config.yaml": ("ms-swift", 0, set()),
    "swift-dpo.yaml": ("ms-swift", 1, {NO_REWARD}),
    "swift-lora.sh": ("ms-swift", 0, set()),
    "swift-multi-turn.sh": ("ms-swift", 1, {NO_DATA, NO_REWARD}),
    "swift-qlora.sh": ("ms-swift", 1, {"REWARD001"}),
    "trl-cli.yaml": ("trl", 0, set()),
    "trl-config.sh": ("trl", 1, {NO_REWARD}),
    "trl-full.yaml": ("trl", 1, {NO_REWARD}),
    "trl-grpo.sh": ("trl", 1, {"REWARD001"}),
    "trl-mixture.yaml": ("trl", 1, {"REWARD001"}),
    "trl-old.yaml": ("trl", 1, {"DATA005", "REWARD001"}),
    "unsloth-defaults.py": ("script", 1, {NO_DATA, "REWARD001"}),
    "unsloth-script.py": ("script", 1, {"REWARD001"}),
    "verl-config.yaml": ("verl", 1, {NO_REWARD}),
    "verl-dapo.sh": ("verl", 1, {NO_REWARD}),
    "verl-lora.sh": ("verl", 1, {NO_DATA, NO_REWARD}),
    "verl-minibatch.sh": ("verl", 1, {"REWARD001"}),
    "verl-no-lora.yaml": ("verl", 1, {NO_REWARD}),
    "verl-ppo.sh": ("verl", 1, {NO_DATA, NO_REWARD}),
}


def run(*arguments: object) -> Any:
    """Run ``toolkit import`` in this process."""
    outcome = CliRunner().invoke(import_config, [str(one) for one in arguments])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exc_info
    return outcome


def test_every_fixture_has_an_expected_outcome() -> None:
    assert {path.name for path in FILES} == set(OUTCOMES)
    assert len(FILES) >= 40
    assert {format_name for format_name, _, _ in OUTCOMES.values()} == {
        "axolotl", "trl", "script", "verl", "prime-rl", "ms-swift",
    }  # fmt: skip
    assert {path.stem for path in EXPECTED.iterdir()} == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_becomes_the_expected_run_file(path: Path, tmp_path: Path) -> None:
    format_name, code, errors = OUTCOMES[path.name]
    assert read_foreign_config(str(path)).format_name == format_name
    to = tmp_path / "run.yaml"
    outcome = run(path, "--to", to)
    text = to.read_text(encoding="utf-8")
    expected = EXPECTED / f"{path.name}.yaml"
    if os.environ.get("TOOLKIT_REWRITE_EXPECTED"):
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8")
    assert (outcome.exit_code, set(re.findall(r"error\[(\w+)\]", outcome.stderr))) == (code, errors)
    document = load_document(to)
    assert document.findings == []  # the run file has no finding, whatever the other file contains
    assert guess_format(document) is None or NO_MODEL in errors


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_setting_is_lost(path: Path, tmp_path: Path) -> None:
    """The run file names each setting of the other file with its line, at a key or in a list."""
    to = tmp_path / "run.yaml"
    run(path, "--to", to)
    text = to.read_text(encoding="utf-8")
    format_name = OUTCOMES[path.name][0]
    for entry in read_foreign_config(str(path)).entries:
        row = load_table(format_name).find_row(entry.key)
        if entry.key.endswith("reward_weights") or (row is not None and row.convert is later):
            continue  # converted together with other settings, so it has no line of its own
        assert f"{entry.location}: {entry.key}" in text, entry


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_validate_names_the_command(path: Path) -> None:
    outcome = CliRunner().invoke(validate, [str(path)])
    assert outcome.exit_code == 1
    assert outcome.stdout.count("error[") == 1
    assert "error[IMPORT001]" in outcome.stdout
    assert f"toolkit import {path}" in outcome.stdout


@pytest.mark.parametrize("path", UNREADABLE, ids=lambda path: path.name)
def test_an_unreadable_file_ends_with_exit_code_2(path: Path, tmp_path: Path) -> None:
    to = tmp_path / "run.yaml"
    outcome = CliRunner().invoke(import_config, [str(path), "--to", str(to)])
    assert getattr(outcome.exception, "exit_code", None) == 2, outcome.output
    assert str(path) in str(outcome.exception)
    assert not to.exists()


@pytest.mark.parametrize("path", UNREADABLE, ids=lambda path: path.name)
def test_validate_does_not_mistake_run_files_for_files_of_another_tool(path: Path) -> None:
    outcome = CliRunner().invoke(validate, [str(path)])
    if path.name not in ("tab.yaml", "syntax.py", "broken.ipynb"):
        assert "IMPORT001" not in outcome.stdout


def test_a_script_is_never_executed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib\n"
        "pathlib.Path('ran').touch()\n"
        "from trl import GRPOConfig\n"
        "GRPOConfig(num_generations=8, max_steps=__import__('os').system('touch ran'),\n"
        "           learning_rate=2 ** 99999999, seed=[7] * 10 ** 9)\n"
    )
    result = subprocess.run(
        [Path(sys.executable).with_name("toolkit"), "import", script, "--to", "-"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert not (tmp_path / "ran").exists()
    assert "could not be read" in result.stderr
    assert "num_generations: 8" in result.stdout


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    source = Path(shutil.copy(FOREIGN / "trl-cli.yaml", tmp_path))
    assert run(source).exit_code == 0
    run_file = tmp_path / "trl-cli-run.yaml"
    run_file.write_text("mine")
    refusal = CliRunner().invoke(import_config, [str(source)])
    assert getattr(refusal.exception, "exit_code", None) == 1
    assert "--force" in str(refusal.exception)
    assert run_file.read_text() == "mine"
    assert run(source, "--force").exit_code == 0
    assert run_file.read_text() != "mine"


def test_the_result_can_be_printed_and_checked_with_strict() -> None:
    valid = run(FOREIGN / "trl-cli.yaml", "--to", "-")
    assert (valid.exit_code, valid.stdout.splitlines()[0]) == (
        0, "# Made from trl-cli.yaml (TRL) by toolkit import.",
    )  # fmt: skip
    assert run(FOREIGN / "trl-cli.yaml", "--to", "-", "--strict").exit_code == 0


@pytest.mark.parametrize(("setting", "code"), [("mystery: 1", 5), ("test_split_size: 0.1", 1)])
def test_strict_fails_for_unread_and_refused_settings(
    setting: str, code: int, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((FOREIGN / "trl-cli.yaml").read_text() + setting + "\n")
    assert run(path).exit_code == 0
    assert run(path, "--strict", "--force").exit_code == code


def test_a_secret_is_not_copied(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 30
    path = tmp_path / "config.yaml"
    path.write_text(
        (FOREIGN / "trl-cli.yaml").read_text()
        + f"hub_token: {secret}\nrun_name: {secret}\nmystery: {secret}\n"
    )
    outcome = run(path, "--to", tmp_path / "run.yaml")
    assert secret not in (tmp_path / "run.yaml").read_text() + outcome.output


@pytest.mark.parametrize("format_name", ["verl", "ms-swift", "trl"])
def test_a_hostile_name_stays_in_its_comment(format_name: str, tmp_path: Path) -> None:
    """Line breaks in the names and values of the other file add no keys to the run file."""
    path = tmp_path / "args.json"
    keys = '"a\\nruntime:\\n  allow_code: [evil]": 1, "x": "y\\u2028\\nmodel: {model_name: evil}"'
    path.write_text('{"model_name_or_path": "m\\nruntime: {allow_code: [evil]}", ' + keys + "}")
    run(path, "--from", format_name, "--to", tmp_path / "run.yaml")
    document = load_document(tmp_path / "run.yaml")
    assert document.findings == []
    assert document.find_node(("runtime", "allow_code")) is None
    assert document.find_node(("runtime", "output_dir")) is not None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("clip_ratio: 0.2, clip_ratio_c: 1.21", "  delta: 1.21  # actor_rollout_ref.actor"),
        ("clip_ratio_high: 2.5", None),  # verl's default of 3 is not above 1 + 2.5
        ("clip_ratio: 0.2, clip_ratio_c: 1.2", "clip_ratio_c: 1.2 - grpo.delta has the same"),
        ("clip_ratio_high: 0.5, clip_ratio_c: 1.5", "clip_ratio_c: 1.5 - grpo.delta has the same"),
        ("clip_ratio_c: null", "clip_ratio_c: null - grpo.delta has the same"),
    ],
)
def test_dual_clipping_of_verl_becomes_delta_where_both_are_equal(
    settings: str, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "verl.yaml"
    path.write_text(
        "actor_rollout_ref:\n  model: {path: m, lora_rank: 8}\n  actor: {" + settings + "}\n"
        "data: {train_files: a.jsonl}\n"
    )
    text = run(path, "--from", "verl", "--to", "-").stdout
    if expected is not None:
        assert expected in text
    if expected is None or "has the same" in expected:
        assert "  delta:" not in text


def test_from_selects_the_format_of_an_ambiguous_file(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("actor: 1\nnum_generations: 8\n")
    assert getattr(CliRunner().invoke(import_config, [str(path)]).exception, "exit_code", 0) == 2
    outcome = run(path, "--from", "trl", "--to", "-")
    assert "num_generations: 8  # line 2: num_generations" in outcome.stdout
    assert "actor: 1 - this is not a known key of TRL" in outcome.stdout


def test_the_table_of_a_format_is_printed() -> None:
    from toolkit.config.importers.write import table_markdown

    assert run("--table", "verl").stdout == table_markdown("verl")
    assert "| `data.max_prompt_length` | `grpo.max_prompt_length` | same |" in table_markdown(
        "verl"
    )


def test_a_notebook_with_large_outputs(tmp_path: Path) -> None:
    """A notebook that is too large for a run file is imported, and validate names the command."""
    path = tmp_path / "large.ipynb"
    notebook = json.loads((FOREIGN / "notebook-qwen.ipynb").read_text())
    notebook["cells"][-1]["outputs"] = [{"output_type": "stream", "text": "x" * (1 << 20)}]
    path.write_text(json.dumps(notebook))
    judged = CliRunner().invoke(validate, [str(path)])
    assert (judged.exit_code, f"toolkit import {path}" in judged.stdout) == (2, True)
    assert "model_name: unsloth/Qwen3-4B-Base" in run(path, "--to", "-").stdout
