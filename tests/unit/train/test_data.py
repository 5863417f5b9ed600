"""load_data returns the rows for the trainer, reports on the data, and refuses invalid data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_helpers import make_tokenizer, user

from toolkit.base.errors import ConfigError, InputError
from toolkit.config.run_config import DatasetSection
from toolkit.train import demo
from toolkit.train.data import dataset_source
from toolkit.train.data.dataset import load_data


def write(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str | None, tokenizer: Any = None, limit: int | None = None, **section: Any):
    chosen = DatasetSection(path=path, **{"prompt": "q", "answer": "a", **section})
    return load_data(chosen, tokenizer or make_tokenizer(), max_prompt_length=limit)


def test_the_default_limit_counts_only_prompts_that_may_be_longer(tmp_path: Path) -> None:
    section = DatasetSection(path=write(tmp_path, [{"q": "w1"}, {"q": "w2 " * 900}]), prompt="q")
    data = load_data(section, make_tokenizer(), max_prompt_length=500, count_all=False)
    assert (data.report.train.truncated, data.report.train.longest_tokens) == (1, 901)
    assert [len(row["prompt"].split()) for row in data.train] == [1, 499]
    short = DatasetSection(path=write(tmp_path, [{"q": "w1"}]), prompt="q")
    data = load_data(short, make_tokenizer(), max_prompt_length=500, count_all=False)
    assert (data.report.train.truncated, data.report.train.longest_tokens) == (0, None)


def test_plain_prompts_with_their_columns(tmp_path: Path) -> None:
    rows = [{"q": "w1", "a": 1, "level": "x"}, {"q": "w2", "a": 2, "level": "y"}]
    path = write(tmp_path, rows)
    data = load(path)
    assert data.train.to_list() == [
        {"q": "w1", "a": 1, "level": "x", "prompt": "w1", "answer": 1},
        {"q": "w2", "a": 2, "level": "y", "prompt": "w2", "answer": 2},
    ]
    assert data.eval is None
    report = data.report.train
    assert report.digest == f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
    assert report.lines() == [f"2 plain prompts from {path}"]
    assert report.columns == ("q", "a", "level", "prompt", "answer")
    json.dumps(data.report.to_json())


def test_empty_duplicate_and_long_prompts_are_counted(tmp_path: Path) -> None:
    texts = ["w1", "", "w2 w3 w4 w5", "w1", None, "  ", "w1"]
    data = load(write(tmp_path, [{"q": text, "a": 0} for text in texts]), limit=3)
    assert data.train["prompt"][:] == ["w1", "w4 w5", "w1", "w1"]
    assert data.report.lines() == [
        f"4 plain prompts from {tmp_path}/train.jsonl",
        "3 of 7 rows have no prompt and were left out",
        "2 prompts are duplicates of earlier prompts and were kept",
        "1 prompts were longer than grpo.max_prompt_length: their first tokens were removed "
        "(the longest had 5 tokens)",
    ]


def test_chats_and_a_system_prompt(tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": [user("w1")], "a": 0}])
    data = load(path, make_tokenizer(chat=True), system="w9")
    assert data.train["prompt"][0] == [{"role": "system", "content": "w9"}, user("w1")]
    assert data.report.train.chat
    with pytest.raises(ConfigError, match="no chat template"):
        load(path)


def test_a_text_becomes_a_user_message_with_a_chat_template(tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": "w1", "a": 0}])
    chat = make_tokenizer(chat=True)
    asked = load(path, chat)
    assert asked.train["prompt"][0] == [user("w1")]
    assert asked.report.lines() == [
        f"1 chats from {path}; each text becomes a user message of the chat template (dataset.chat)"
    ]
    assert load(path, chat, system="w9").train["prompt"][0] == [
        {"role": "system", "content": "w9"},
        user("w1"),
    ]
    assert load(path).train["prompt"][0] == "w1"


def test_a_system_prompt_does_not_change_the_format(tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": "w1", "a": 0}])
    chat = make_tokenizer(chat=True)
    assert load(path, system="w9").train["prompt"][0] == "w9\n\nw1"
    assert load(path, chat, chat=False).train["prompt"][0] == "w1"
    assert load(path, chat, chat=False, system="w9").train["prompt"][0] == "w9\n\nw1"


def test_the_held_out_split_has_the_same_format(tmp_path: Path) -> None:
    rows = [{"q": "w1", "a": 0}]
    path, held_out = write(tmp_path, rows), write(tmp_path, rows, "eval.jsonl")
    data = load(path, make_tokenizer(chat=True), eval_path=held_out)
    assert data.eval["prompt"][0] == [user("w1")]


def test_chats_with_chat_false_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": [user("w1")], "a": 0}])
    with pytest.raises(ConfigError, match=r"'q' contains lists of chat messages, but dataset"):
        load(path, make_tokenizer(chat=True), chat=False)


def test_tokens_of_the_chat_template_count_toward_the_length(tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": "w1 w2 w3", "a": 0}])
    chat = make_tokenizer(chat=True)
    assert (
        load(path, chat, limit=6).report.train.truncated == 0
    )  # <user>, 3 words, </s>, <assistant>
    cut = load(path, chat, limit=5)
    assert (cut.report.train.truncated, cut.report.train.longest_tokens) == (1, 6)
    assert cut.train["prompt"][0] == [user("w2 w3")]


def test_limits_and_a_held_out_file(tmp_path: Path) -> None:
    rows = [{"q": f"w{number}", "a": number} for number in range(10)]
    held_out = write(tmp_path, rows, "eval.jsonl")
    data = load(write(tmp_path, rows), limit=9, eval_path=held_out, eval_limit=3)
    assert (len(data.train), len(data.eval or [])) == (10, 3)
    assert f"held out: 3 plain prompts from {held_out}" in data.report.lines()
    path = write(tmp_path, rows)
    chosen = DatasetSection(path=path, prompt="q", limit=4)
    assert len(load_data(chosen, make_tokenizer()).train) == 4


def test_a_saved_folder_with_and_without_splits(tmp_path: Path) -> None:
    train = datasets.Dataset.from_list([{"q": "w1", "a": 1}, {"q": "w2", "a": 2}])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": train.select([1])}).save_to_disk(tmp_path / "two")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert load(one).train["answer"][:] == [1, 2]
    data = load(two, eval_split="test")
    assert data.eval is not None
    assert data.eval["prompt"][:] == ["w2"]
    assert data.report.train.digest.startswith("sha256:")
    assert data.report.train.digest == load(one).report.train.digest
    with pytest.raises(ConfigError, match=r"has no split 'dev'[\s\S]*one of train, test"):
        load(two, eval_split="dev")


def test_a_path_outside_a_saved_folder_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"q": "w1", "a": 1}]).save_to_disk(tmp_path / "d")
    state = tmp_path / "d" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": "../../secret.arrow"}]
    state.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"file in state\.json leads outside its folder"):
        load(str(tmp_path / "d"))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "dataset_dict.json").write_text('{"splits": ["../d"]}')
    with pytest.raises(ConfigError, match="a split leads outside its folder"):
        load(str(tmp_path / "s"), split="../d")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), InputError),
        (lambda folder: (folder / "state.json").write_text('{"_data_files": [1]}'), InputError),
        (lambda folder: (folder / "dataset_info.json").unlink(), InputError),
        (lambda folder: next(folder.glob("*.arrow")).write_bytes(b"torn"), InputError),
        (lambda folder: (folder / "state.json").unlink(), ConfigError),
    ],
)
def test_a_damaged_saved_folder_is_an_error(tmp_path: Path, damage, error) -> None:
    datasets.Dataset.from_list([{"q": "w1", "a": 1}]).save_to_disk(tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(error, match=str(tmp_path / "d")):
        load(str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"prompt": "quest"}, "'quest', which does not exist; the columns are q, a"),
        ({"prompt": "qq"}, "fix: set `dataset.prompt` to q"),
        ({"answer": "answer"}, "dataset.answer names the column 'answer'"),
        (
            {"eval_split": "test"},
            "is a single file without splits, but the run file sets the split 'test'",
        ),
        ({"path": None}, "the run file names no dataset, so there are no prompts to train on"),
    ],
)
def test_invalid_dataset_sections_are_refused(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, [{"q": "w1", "a": 1}])
    with pytest.raises(ConfigError, match=message):
        load(**{"path": path, **section})


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "the dataset is empty"), ([{"q": "", "a": 1}], "no row has a prompt in the column 'q'")],
)
def test_data_without_prompts_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, rows))


@pytest.mark.parametrize("key", ["path", "eval_path"])
def test_the_error_for_a_missing_file_names_the_key(tmp_path: Path, key: str) -> None:
    existing = {"path": write(tmp_path, [{"q": "w1", "a": 0}])}
    with pytest.raises(InputError, match="the file does not exist") as caught:
        load(**existing | {key: str(tmp_path / "missing.jsonl")})
    assert caught.value.where == f"dataset.{key}: {tmp_path}/missing.jsonl"


def test_columns_that_are_left_out_are_reported(tmp_path: Path) -> None:
    rows = [{"q": "w1", "prompt": "other", "answer": "old", "a": 1, "completions": 5}]
    data = load(write(tmp_path, rows))
    assert data.train.to_list() == [{"q": "w1", "a": 1, "prompt": "w1", "answer": 1}]
    assert data.report.train.notes == (
        "the column 'prompt' is left out, because dataset.prompt is the column 'q'",
        "the column 'answer' is left out, because dataset.answer is the column 'a'",
        "the column 'completions' is left out: the trainer itself passes an argument with the name "
        "completions to every reward",
    )


def test_prompts_with_many_unknown_tokens_are_reported(tmp_path: Path) -> None:
    rows = [{"q": "Ada has 5 pens", "a": 1}, {"q": "12+30=", "a": 42}]
    data = load(write(tmp_path, rows), demo.make_tokenizer())
    assert data.report.train.notes == (
        "65% of the tokens of the first prompts are unknown to the tokenizer (<pad>), so the model "
        "cannot read them",
    )
    assert load(write(tmp_path, rows[1:]), demo.make_tokenizer()).report.train.notes == ()


def test_the_usual_column_names(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "w1", "answer": "5"}])
    data = load_data(DatasetSection(path=path, answer="answer"), make_tokenizer())
    assert data.train.to_list() == [{"prompt": "w1", "answer": "5"}]
    assert data.report.train.notes == ()


def test_a_hub_dataset_without_a_network_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match=r"was not found: this machine has no such file.* HF_HUB_OFFLINE is set"
    ):
        load("somebody/nothing")


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ConnectionError("no"), "the hub does not answer", 4),
        (
            datasets.exceptions.DatasetNotFoundError("gone"),
            "a hub dataset with this name .*gone",
            1,
        ),
        (ValueError("Unknown split"), "Unknown split", 1),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer", 1),
    ],
)
def test_errors_of_the_hub_become_user_errors(
    monkeypatch, error: Exception, message: str, code: int
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(dataset_source.datasets, "load_dataset", load_dataset)
    with pytest.raises(Exception, match=message) as caught:
        load("somebody/nothing")
    assert caught.value.exit_code == code


def test_a_dataset_from_the_hub_is_hashed_by_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_list([{"q": "w1", "a": 1}, {"q": "w2", "a": 2}])
    seen: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        seen.update(options, path=path)
        return made

    monkeypatch.setattr(dataset_source.datasets, "load_dataset", load_dataset)
    data = load("org/name", name="main", revision="abc", split="train[:5]")
    assert seen == {"path": "org/name", "name": "main", "split": "train[:5]", "revision": "abc"}
    assert data.train["answer"][:] == [1, 2]
    again = load("org/name", name="main").report.train.digest
    made = made.map(lambda row: {"a": row["a"] + 1})
    assert data.report.train.digest == again
    assert data.report.train.digest != load("org/name", name="main").report.train.digest
