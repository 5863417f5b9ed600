"""The output for findings, rules and keys: source lines, secrets, control characters, explanations
and suggestions.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolkit.base.did_you_mean import nearest
from toolkit.base.errors import EXIT_CODES, UnestablishedError
from toolkit.cli.envcheck import cli
from toolkit.config import find_schema
from toolkit.config.document_loader import assemble
from toolkit.config.explain import all_keys, explain
from toolkit.config.finding_output import source_excerpt
from toolkit.config.libraries import allowed_values, installed_values
from toolkit.config.rules import Situation, all_rules
from toolkit.config.rules.batch import divisors_at_least, multiple_at_least, nearest_divisor
from toolkit.config.source import Position, Source, dotted
from toolkit.config.validate import validate


def source(text: str) -> Source:
    """A run file with this text."""
    return Source("run.yaml", text, Path("/nonexistent"))


def test_a_long_line_is_shortened_around_the_position() -> None:
    text = "a: " + "x" * 5000 + "HERE" + "y" * 5000
    line = source_excerpt(source(text), Position(1, 5004, 5003, 5007))
    assert "HERE" in line
    assert line.startswith("...")
    assert line.endswith("...")
    assert len(line) < 200


def test_a_secret_at_the_edge_of_a_long_line_is_not_shown() -> None:
    token = "hf_" + "canary" * 6
    for gap in range(0, 240, 3):
        text = "a: x " + " " * gap + token + " " * 2000
        assert "canary" not in source_excerpt(source(text), Position(1, 4, 3, 4))


def test_secrets_and_control_characters_are_not_printed() -> None:
    shown = source("password: hunter2 # and more\n")
    shown.hide_secret(Position(1, 11, 10, 17))
    assert source_excerpt(shown, Position(1, 1, 0, 8)) == "password: [hidden] # and more"
    hostile = source("a: \x1b[31mred\x07\u202e\n")
    assert source_excerpt(hostile, Position(1, 1, 0, 1)) == "a: \ufffd[31mred\ufffd\ufffd"


def test_dotted_paths() -> None:
    assert dotted(("reward", "functions", 0, "name")) == "reward.functions[0].name"
    assert dotted(()) == "the run file"


@pytest.mark.parametrize("name", sorted(all_rules()))
def test_every_rule_is_explained(name: str) -> None:
    rule = all_rules()[name]
    text = explain(name.lower())
    assert text is not None
    assert rule.summary.endswith(".")
    for part in (name, rule.summary, rule.fix.split("\n")[0], rule.example.split("\n")[0]):
        assert part in text
    assert rule.why or name == "RUN002"


def test_every_rule_names_existing_keys() -> None:
    names = {name for name, _ in all_keys()}
    for rule in all_rules().values():
        assert set(rule.keys) <= names, rule.id


def test_every_key_is_explained() -> None:
    for name, schema in all_keys():
        text = explain(name)
        assert text is not None, name
        assert schema["description"][:20].split(" ")[0] in text


def test_an_explained_key_has_type_default_unit_and_rules() -> None:
    text = explain("max_seq_length")
    assert text is not None
    for part in (
        "model.max_seq_length",
        "an integer, at least 2",
        "default:  2048",
        "tokens",
        "LEN001",
    ):
        assert part in text


def test_the_explain_command() -> None:
    run = CliRunner().invoke
    done = run(cli, ["explain", "exit-codes"])
    assert all(f"{code:>3}  {meaning}" in done.output for code, meaning in EXIT_CODES.items())
    assert run(cli, ["explain", "75"]).output == f"exit code 75: {EXIT_CODES[75]}\n"
    assert set(all_rules()) == {
        line.split()[0] for line in run(cli, ["explain", "rules"]).output.splitlines()
    }
    pasted = "ValueError: No available memory for the cache blocks. Try increasing it"
    assert "found by:  envcheck" in run(cli, ["explain", "-"], input=pasted).output
    unknown = run(cli, ["explain", "-"], input="all is well")
    assert isinstance(unknown.exception, UnestablishedError)
    assert "no known error found" in str(unknown.exception)
    assert "a check of envcheck check" in run(cli, ["explain", "memory.free"]).output
    wrong = run(cli, ["explain", "num_generation"])
    assert wrong.exit_code == 1
    assert "num_generations" in str(wrong.exception)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steps_without_signal", "learn nothing from the rewards"),
        ("rewards/my_reward/mean", "The mean of one reward function"),
        ("logp_gap_mean", "log-probabilities of the engine and of the trainer"),
        ("eval/reward", "mean weighted reward"),
        ("timing/rollout_s", "a value in timings.jsonl"),
        ("learning_rate", "a value in metrics.jsonl"),
        ("metrics", "dynamic_sampling/no_spread_after"),
    ],
)
def test_a_metric_name_is_explained(name: str, expected: str) -> None:
    done = CliRunner().invoke(cli, ["explain", name])
    assert done.exit_code == 0, done.exception
    assert expected in " ".join(done.output.split())


def test_a_misspelled_metric_name_gets_a_suggestion() -> None:
    wrong = CliRunner().invoke(cli, ["explain", "steps_without_signl"])
    assert "did you mean steps_without_signal?" in str(wrong.exception)


def test_every_metric_of_the_training_is_explained() -> None:
    """The names are those in quotes in the sources. An acceptance test checks the rows of a run."""
    sources = Path(__file__).parents[3] / "toolkit" / "train"
    written = r'"((?:sampling|packing|dynamic_sampling|curriculum|completions)/[a-z_/]+)"'
    names = {
        name
        for part in ("report", "rollout", "step")
        for file in (sources / part).glob("*.py")
        for name in re.findall(written, file.read_text("utf-8"))
    }
    assert len(names) > 15
    names -= {"completions/mean_length"}  # recorded as completion_length
    assert [name for name in sorted(names) if explain(name) is None] == []


def test_the_schema_command() -> None:
    import json

    done = CliRunner().invoke(cli, ["schema"])
    assert json.loads(done.output) == find_schema("run")
    path = CliRunner().invoke(cli, ["schema", "findings", "--path"]).output.strip()
    assert json.loads(Path(path).read_text("utf-8")) == find_schema("findings")
    assert "run" in CliRunner().invoke(cli, ["schema", "--list"]).output.split()


def test_the_nearest_word_is_suggested() -> None:
    words = ["num_generations", "lora_alpha", "q_proj"]
    assert nearest("num_generation", words) == "num_generations"
    assert nearest("LORA-ALPHA", words) == "lora_alpha"
    assert nearest("zebra", words) is None
    assert nearest("x" * 10_000, words) is None


def test_recorded_values_replace_a_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toolkit.config import libraries

    monkeypatch.setattr(libraries, "package_folder", lambda _: None)
    assert installed_values("lora_ranks") is None
    allowed_values.cache_clear()
    assert allowed_values("lora_ranks") == libraries.RECORDED["lora_ranks"]
    allowed_values.cache_clear()


def test_batch_arithmetic() -> None:
    assert divisors_at_least(12, 2) == [2, 3, 4, 6, 12]
    assert nearest_divisor(12, 5) == 4
    assert nearest_divisor(4, 8) == 2
    assert nearest_divisor(7, 3) == 7
    assert nearest_divisor(1, 8) is None
    assert (multiple_at_least(4, 9), multiple_at_least(4, 8)) == (12, 8)


def test_findings_beyond_the_limit_are_only_counted() -> None:
    text = "".join(f"key{number}: 1\n" for number in range(2000))
    outcome = validate(assemble(source(text)), Situation())
    assert len(outcome.findings) == 501
    assert "more findings" in outcome.findings[-1].message
    assert outcome.config is None
