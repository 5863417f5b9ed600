"""From a run file to the frozen config: values, paths, overrides, and the errors of load_run."""

from __future__ import annotations

import dataclasses
import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import ConfigError, InputError
from toolkit.config import load_document, load_run
from toolkit.config.build_config import freeze, thaw
from toolkit.config.rules import Situation
from toolkit.config.validate import validate

if TYPE_CHECKING:
    from pathlib import Path

RUN = """\
model: {model_name: org/name, max_seq_length: 1024}
dataset: {path: data/train.jsonl, eval_path: org/data}
reward:
  functions:
    - {name: exact_match, options: {tag: answer}}
    - {name: length_penalty, weight: 2, options: {max_length: 9}}
grpo: {learning_rate: 1.0e-5, generation_kwargs: {stop: [a, b]}}
runtime: {output_dir: ../out, allow_code: [a.b]}
lora: {target_modules: [q_proj, v_proj], lora_dropout: 0}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file two folders below the test folder."""
    path = tmp_path / "a" / "b" / "run.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(RUN, "utf-8")
    return path


def test_the_config_is_frozen_all_the_way_down(run_file: Path) -> None:
    config = load_run(run_file)
    assert config.reward.functions[1].weight == 2.0
    assert type(config.reward.functions[1].weight) is float
    assert type(config.lora.lora_dropout) is float
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.grpo["generation_kwargs"]["stop"] == ("a", "b")
    assert thaw(config.grpo)["generation_kwargs"] == {"stop": ["a", "b"]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora.r = 1  # type: ignore[misc]  # the test needs this error
    with pytest.raises(TypeError):
        config.grpo["beta"] = 1  # type: ignore[index]  # the test needs this error
    with pytest.raises(TypeError):
        config.reward.functions[0].options["tag"] = "x"  # type: ignore[index]
    assert "num_generations" not in config.grpo  # only keys that the run file sets


def test_thawing_undoes_freezing() -> None:
    tree = {"a": [1, {"b": [None, "c"]}], "d": {}}
    frozen = freeze(tree)
    assert isinstance(frozen, MappingProxyType)
    assert thaw(frozen) == tree


def test_paths_are_relative_to_the_file_that_they_are_written_in(run_file: Path) -> None:
    config = load_run(run_file)
    folder = run_file.parent
    assert config.source == str(run_file)
    assert config.model.model_name == "org/name"  # the folder does not exist, so this is a hub id
    assert config.dataset.path == str(folder / "data" / "train.jsonl")  # a path, not a hub id
    assert config.dataset.eval_path == "org/data"
    assert config.runtime.output_dir == str(folder.parent / "out")
    assert config.runtime.resume == "auto"
    (folder / "org" / "name").mkdir(parents=True)
    (folder / "org" / "name" / "config.json").write_text("{}", "utf-8")
    assert load_run(run_file).model.model_name == str(folder / "org" / "name")


def test_paths_of_a_base_and_of_overrides(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = run_file.parents[2] / "top.yaml"
    top.write_text("extends: a/b/run.yaml\ndataset: {path: mine.jsonl}\n", "utf-8")
    config = load_run(top)
    assert config.dataset.path == str(top.parent / "mine.jsonl")
    assert config.runtime.output_dir == str(run_file.parent.parent / "out")
    assert config.dataset.eval_path == "org/data"  # the two dataset sections are merged
    monkeypatch.chdir(run_file.parent.parent)
    config = load_run(top, ["dataset.path=here.jsonl", "runtime.output_dir=o"])
    assert config.dataset.path == str(run_file.parent.parent / "here.jsonl")
    assert config.runtime.output_dir == str(run_file.parent.parent / "o")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("grpo.beta=0.5", "grpo", "beta", 0.5),
        ("grpo.generation_kwargs.stop=[x]", "grpo", "generation_kwargs", {"stop": ["x"]}),
        ("model.revision=", "model", "revision", None),
        ("model.revision='1e3'", "model", "revision", "1e3"),
        ("lora.target_modules=all-linear", "lora", "target_modules", "all-linear"),
        ("runtime.allow_code=[c]", "runtime", "allow_code", ["c"]),
    ],
)
def test_overrides_set_values(
    run_file: Path, override: str, section: str, key: str, value: Any
) -> None:
    section_config = getattr(load_run(run_file, [override]), section)
    actual = section_config[key] if section == "grpo" else getattr(section_config, key)
    assert thaw(actual) == value


def test_an_item_of_a_list_is_overridden(run_file: Path) -> None:
    config = load_run(run_file, ["reward.functions.1.weight=3", "reward.functions.0.options.tag=t"])
    assert [function.weight for function in config.reward.functions] == [1.0, 3.0]
    assert config.reward.functions[0].options["tag"] == "t"


@pytest.mark.parametrize(
    "override",
    ["", "=", "lora", ".r=1", "lora..r=1", "reward.functions.7.weight=1", "lora.lora_dropout.x=1"],
)
def test_invalid_overrides_are_findings(run_file: Path, override: str) -> None:
    rules = [finding.rule for finding in validate(load_document(run_file, [override])).findings]
    assert "DOC012" in rules


def test_reward_weights_go_to_their_functions(run_file: Path) -> None:
    config = load_run(run_file, ["reward.functions.1={name: format}", "grpo.reward_weights=[1, 3]"])
    assert [function.weight for function in config.reward.functions] == [1.0, 3.0]
    assert "reward_weights" not in config.grpo


def test_callers_get_errors_with_every_finding(run_file: Path) -> None:
    with pytest.raises(ConfigError) as config_error:
        load_run(run_file, ["lora.r=0", "grpo.temperature=0"])
    assert "LORA001" in str(config_error.value)
    assert "GRPO021" in str(config_error.value)
    assert config_error.value.exit_code == 1
    with pytest.raises(InputError, match="cannot be read") as input_error:
        load_run(run_file.with_name("missing.yaml"))
    assert input_error.value.exit_code == 2


def test_rules_use_the_world_size(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="GRPO001"):
        load_run(run_file, ["grpo.num_generations=6", "grpo.per_device_train_batch_size=2"])
    load_run(
        run_file, ["grpo.num_generations=6", "grpo.per_device_train_batch_size=2"], world_size=3
    )


def test_the_batch_of_a_split_model_is_explained_with_replicas(run_file: Path) -> None:
    settings = ["grpo.num_generations=8", "grpo.per_device_train_batch_size=3",
                "model.tensor_parallel_size=2"]  # fmt: skip
    with pytest.raises(ConfigError) as config_error:
        load_run(run_file, settings, world_size=4)
    assert "number of replicas 2 (world size 4 / tensor_parallel_size 2)" in str(config_error.value)


def test_load_run_returns_the_validated_config(run_file: Path) -> None:
    validation = validate(load_document(run_file), Situation())
    assert validation.ok
    assert validation.config == load_run(run_file)


@pytest.mark.parametrize("form", ["json", "toml"])
def test_all_formats_give_the_same_config(run_file: Path, form: str) -> None:
    texts = {
        "yaml": "model: {model_name: a/b}\nreward: {functions: [{name: format}]}\n"
                "dataset: {path: c/d}\n",
        "json": json.dumps({"model": {"model_name": "a/b"}, "dataset": {"path": "c/d"},
                            "reward": {"functions": [{"name": "format"}]}}),
        "toml": '[model]\nmodel_name = "a/b"\n[dataset]\npath = "c/d"\n'
                '[[reward.functions]]\nname = "format"\n',
    }  # fmt: skip
    configs = []
    for suffix in ("yaml", form):
        path = run_file.with_name(f"same.{suffix}")
        path.write_text(texts[suffix], "utf-8")
        configs.append(dataclasses.replace(load_run(path), source=None))
    assert configs[0] == configs[1]
