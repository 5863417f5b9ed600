"""The demo: answers with and without the carry, held-out problems, and files."""

from __future__ import annotations

import json

import pytest
import torch

from toolkit.base.errors import ConfigError, DefectError
from toolkit.cli.demo import choose_folder
from toolkit.config import load_run
from toolkit.config.schemas import schema_path
from toolkit.train import demo


@pytest.mark.parametrize(
    ("problem", "correct", "without_carry"),
    [
        ((37, 45), "82", "72"),
        ((12, 34), "46", "46"),
        ((99, 99), "198", "188"),
        ((10, 10), "20", "20"),
    ],
)
def test_answers_with_and_without_the_carry(problem, correct, without_carry):
    assert demo.answer(problem) == correct
    assert demo.answer_without_carry(problem) == without_carry


def test_half_of_the_held_out_problems_have_a_carry_and_none_is_trained_on():
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    held_out, rest = demo.hold_out(problems, 500)
    assert len(held_out) == 500
    assert sum(demo.answer(p) != demo.answer_without_carry(p) for p in held_out) == 250
    assert not {*held_out} & {*rest}
    assert len(rest) == 8100 - 500


def test_the_tokenizer_has_one_token_per_character():
    tokenizer = demo.make_tokenizer()
    ids = tokenizer("37+45=")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "37+45="


def test_a_training_row_is_question_answer_and_end_token():
    tokenizer = demo.make_tokenizer()
    rows = demo.encode(tokenizer, [(37, 45), (99, 99)], ["82", "198"])
    assert rows.shape == (2, 10)
    assert rows[0, -2:].tolist() == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert rows[1, -1] == tokenizer.eos_token_id


def test_a_model_that_does_not_learn_is_an_error(monkeypatch):
    monkeypatch.setattr(demo, "MAX_STEPS", 2)
    torch.set_num_threads(1)
    problems = [(a, 11) for a in range(10, 90)]
    with pytest.raises(DefectError, match="did not learn to add in 2 steps"):
        demo.train_to_add(
            demo.make_model(0),
            demo.make_tokenizer(),
            problems,
            problems[:8],
            seed=0,
            print_line=lambda _: None,
        )


def test_the_demo_is_complete_and_its_run_file_is_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_to_add", lambda *_, **__: 1)
    built = demo.build_demo(tmp_path, engine="transformers", seed=3, print_line=lambda _: None)
    config = load_run(str(built.run_file))
    first_line = built.run_file.read_text().splitlines()[0]
    assert first_line == f"# yaml-language-server: $schema={schema_path('run').resolve()}"
    assert config.grpo["seed"] == config.lora.random_state == 3
    assert config.model.model_name == str(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    assert all(eval(row["question"][:-1]) == int(row["answer"]) for row in rows)


def test_the_default_folder_of_the_demo_is_new_or_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(choose_folder(None)) == "runs/demo"
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert str(choose_folder(None)) == "runs/demo-2"
    assert choose_folder("new").name == "new"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        choose_folder("full")
