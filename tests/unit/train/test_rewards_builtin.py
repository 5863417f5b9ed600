"""The built-in rewards: their scores for plain and chat completions, and their options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from toolkit.base.errors import ConfigError, MissingExtraError
from toolkit.config.run_config import ModelSection, RewardFunction, RewardSection, RunConfig
from toolkit.train.rewards import BUILTINS, load_rewards
from toolkit.train.rewards.builtin import inside_tag, text_of


def score(name: str, completion: Any, answer: Any = "x", **options: Any) -> float | None:
    """The score of one completion. load_rewards loads the reward, and the call is as in TRL."""
    config = RunConfig(
        model=ModelSection(model_name="m"),
        # test_rewards_worker.py tests math_verify in its own process.
        reward=RewardSection(
            functions=(RewardFunction(name=name, options=options),), isolate=False
        ),
    )
    (reward,), weights = load_rewards(config, run_dir=Path("unused"))
    assert weights == [1.0]
    (got,) = reward(
        prompts=["p"], completions=[completion], completion_ids=[[1] * 10], answer=[answer]
    )
    return got


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("wrap", [str, chat])
@pytest.mark.parametrize(
    ("name", "options", "completion", "answer", "expected"),
    [
        ("exact_match", {}, " the  answer\n", "the answer", 1.0),
        ("exact_match", {}, "The answer", "the answer", 0.0),
        ("exact_match", {"ignore_case": True}, "The ANSWER", "the answer", 1.0),
        ("exact_match", {"tag": "a"}, "no <a>x</a> <a>y</a> z", "y", 1.0),
        ("exact_match", {"tag": "a"}, "y", "y", 0.0),
        ("exact_match", {}, "7", 7, 1.0),
        ("exact_match", {}, "7", None, None),
        ("numeric_match", {}, "so it is 1,234 kg", "#### 1234", 1.0),
        ("numeric_match", {}, "none", "4", 0.0),
        ("numeric_match", {}, "4", "no number", None),
        ("numeric_match", {"tolerance": 0.01}, "0.333", "1/3", 1.0),
        ("numeric_match", {"tag": "answer"}, "<answer>5</answer> or 6", 5, 1.0),
        ("regex_match", {"pattern": r"\d+$"}, "a 5", None, 1.0),
        ("regex_match", {"pattern": r"\d+", "full": True}, "a 5", None, 0.0),
        ("regex_match", {"pattern": "YES", "ignore_case": True}, "yes!", None, 1.0),
        ("format", {}, "<think>a</think>\n<answer>b</answer>", None, 1.0),
        ("format", {}, "<answer>b</answer><think>a</think>", None, 0.0),
        ("format", {}, "<think>a</think><answer>b</answer> and more", None, 0.0),
        ("format", {"strict": False}, "x <think>a</think> y <answer>b</answer> z", None, 1.0),
        ("format", {}, "<think><answer>b</answer></think>", None, 0.0),
        ("format", {}, "<think>a</think><think>a</think><answer>b</answer>", None, 0.0),
        ("format", {"partial": True}, "<think>a</think>", None, 0.25),
        ("format", {"partial": True}, "<answer>b</answer><think>a</think>", None, 0.5),
        ("format", {"opened": True}, "a</think><answer>b</answer>", None, 1.0),
        ("format", {"tags": ["r"]}, "<r></r>", None, 1.0),
        ("length_penalty", {"max_length": 10}, "any", None, 0.0),
        ("length_penalty", {"max_length": 9}, "any", None, -1.0),
        ("length_penalty", {"max_length": 12, "margin": 8}, "any", None, -0.75),
        ("length_penalty", {"max_length": 2, "unit": "characters"}, "long", None, -1.0),
    ],
)
def test_scores(wrap, name, options, completion, answer, expected) -> None:
    assert score(name, wrap(completion), answer, **options) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "exactmatch",
            {},
            "the reward 'exactmatch' does not exist[\\s\\S]*did you mean exact_match",
        ),
        ("exact_match", {"colum": "x"}, "has no option 'colum'[\\s\\S]*did you mean column"),
        ("exact_match", {"column": 5}, "option column must be text, not 5"),
        ("exact_match", {"ignore_case": 1}, "option ignore_case must be bool, not 1"),
        ("numeric_match", {"tolerance": True}, "tolerance must be float"),
        ("numeric_match", {"tolerance": 2.0}, re.escape("tolerance must be in [0, 1)")),
        ("regex_match", {}, "needs the option pattern"),
        ("regex_match", {"pattern": "("}, "is not a valid regular expression"),
        ("format", {"tags": []}, "at least one"),
        ("format", {"tags": ["a", "a"]}, "all names must differ"),
        ("format", {"tags": [1]}, "list of texts"),
        ("length_penalty", {}, "needs the option max_length"),
        ("length_penalty", {"max_length": 5, "margin": 6}, "margin must be from 0 to max_length"),
        ("length_penalty", {"max_length": 5, "unit": "words"}, "tokens or characters"),
    ],
)
def test_refused_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score(name, "x", **options)


def test_the_error_for_a_missing_column_lists_the_existing_columns() -> None:
    with pytest.raises(ConfigError, match=r"needs the column 'solution'[.] .* answer"):
        score("exact_match", "x", column="solution")


def test_every_built_in_reward_is_documented() -> None:
    assert all(kind.__doc__ and "1" in kind.__doc__ for kind in BUILTINS.values())


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([], ""),
        (chat("one"), "one"),
        ([*chat("call"), {"role": "tool", "content": "4"}, *chat("so 4")], "so 4"),
        ([{"role": "assistant", "content": None}], ""),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            "a",
        ),
        ([{"role": "user", "content": "u"}], "u"),
    ],
)
def test_the_text_of_a_completion(completion: Any, text: str) -> None:
    assert text_of(completion) == text


@pytest.mark.parametrize(
    ("text", "inside"),
    [("<a>1</a>", "1"), ("<a>1<a>2</a>", "2"), ("<a>1", None), ("<a></a>", ""), ("<b>1</b>", None)],
)
def test_inside_a_tag(text: str, inside: str | None) -> None:
    assert inside_tag(text, "a") == inside


def test_math_verify_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"grpo-toolkit\[math\]"):
        score("math_verify", "x")


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"so $\frac{2}{4}$", "0.5", 1.0),
        (r"\boxed{x = 3}", "$3$", 1.0),
        (r"$\{1, 2\}$", r"$\{2, 1\}$", 1.0),
        ("$5$", "#### 6", 0.0),
        ("no mathematics", "$6$", 0.0),
    ],
)
def test_math_verify(completion: str, answer: str, expected: float) -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    assert score("math_verify", completion, answer) == expected
