"""The values that the validator records for TRL, vLLM and PEFT are those of the installed
libraries.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.config import find_schema, load_run
from toolkit.config.common_names import COMMON_NAMES
from toolkit.config.libraries import RECORDED, installed_values, package_folder
from toolkit.config.migration import FORCED_KEYS, MOVED_KEYS
from toolkit.config.reward_table import BUILTIN_OPTIONS
from toolkit.train.grpo_config import TOOLKIT_FIELDS

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig

pytestmark = pytest.mark.contract
ROOT = Path(__file__).parents[2]
GRPO: dict[str, dict[str, Any]] = find_schema("run")["properties"]["grpo"]["properties"]


def test_the_schema_is_generated_from_the_installed_trl() -> None:
    process = subprocess.run(
        [sys.executable, ROOT / "schemas" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_every_field_of_grpo_config_is_in_the_schema() -> None:
    import trl

    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig) if field.init}
    assert set(GRPO) == fields | set(TOOLKIT_FIELDS) - {"padding_free"}


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_the_recorded_values_are_the_installed_ones(name: str) -> None:
    library_values = installed_values(name)
    assert library_values is not None, (
        f"{name}: the library is installed, but its values were not found"
    )
    assert library_values.values == RECORDED[name].values


def test_the_ranks_are_those_that_vllm_accepts() -> None:
    """The source text from which we read the ranks is the type of vLLM's max_lora_rank."""
    folder = package_folder("vllm")
    if folder is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((folder / "config" / "lora.py").read_text(encoding="utf-8"))
    annotations = {
        statement.target.id: ast.unparse(statement.annotation)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "LoRAConfig"
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    assert annotations["max_lora_rank"] == "MaxLoRARanks"
    schema = find_schema("run")["properties"]["model"]["properties"]["max_lora_rank"]["enum"]
    assert schema == ["auto", *RECORDED["lora_ranks"].values]


def test_the_loss_types_are_those_that_the_loss_knows() -> None:
    """TRL's loss compares loss_type with each of the names, and with no other name."""
    folder = package_folder("trl")
    assert folder is not None
    tree = ast.parse((folder / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8"))
    loss = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_loss"
    )
    compared = {
        constant.value
        for node in ast.walk(loss)
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type"
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant)
    }
    assert compared == set(RECORDED["loss_types"].values)
    assert GRPO["loss_type"]["enum"] == list(RECORDED["loss_types"].values)


def test_the_inits_are_those_that_peft_accepts() -> None:
    import peft

    annotation = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    literals = [
        typing.get_args(member) for member in typing.get_args(annotation) if member is not bool
    ]
    assert {*literals[0], "lora_ga"} == set(RECORDED["lora_inits"].values)


def test_moved_keys_are_not_in_the_schema_and_their_replacements_are() -> None:
    sections = find_schema("run")["properties"]
    for old, moved in MOVED_KEYS.items():
        section, _, name = old.partition(".")
        current = sections[section]["properties"].get(name)
        assert current is None or "x-refused" in current, f"{old} is a current key"
        if moved.new_key is not None:
            section, _, name = moved.new_key.partition(".")
            assert not name or name in sections[section]["properties"], (
                f"the replacement of {old} is not a key"
            )


def test_a_common_name_is_not_a_key_and_maps_to_a_key() -> None:
    sections = find_schema("run")["properties"]
    assert len(COMMON_NAMES) > 100
    for common_name, key in COMMON_NAMES.items():
        section, _, name = common_name.partition(".")
        assert name not in sections[section]["properties"], f"{common_name} is a key"
        assert common_name not in MOVED_KEYS, f"{common_name} is in MOVED_KEYS"
        assert key.partition(".")[2] in sections[section]["properties"], f"{key} is not a key"


def test_the_reward_table_has_the_rewards_of_training() -> None:
    from toolkit.train.rewards import BUILTINS

    training_rewards = {
        name: {
            field.name: field.default is dataclasses.MISSING
            for field in dataclasses.fields(reward_class)
        }
        for name, reward_class in BUILTINS.items()
    }
    assert training_rewards == BUILTIN_OPTIONS


def test_keys_that_the_trainer_overrides_have_a_finding(tmp_path: Path) -> None:
    """A grpo key that the trainer would override is refused, or reported as without effect."""
    from toolkit.train.trl_arguments import grpo_config

    run_file = tmp_path / "run.json"
    model = {"model_name": "nobody/nothing"}
    rewards = {"functions": [{"name": "exact_match"}]}
    run_file.write_text(
        json.dumps({"model": model, "reward": rewards, "dataset": {"path": "a/b"}}), "utf-8"
    )
    config = load_run(run_file)
    overridden = {}
    for name, schema in GRPO.items():
        if "x-refused" in schema or name in ("max_prompt_length", "reward_weights"):
            continue
        for value in non_default_values(schema):
            arguments = _trl_arguments(grpo_config, config, tmp_path, {name: value})
            if arguments.get(name, value) != value:
                overridden[name] = value
    assert set(overridden) - {key.partition(".")[2] for key in FORCED_KEYS} <= {"log_completions"}


def non_default_values(schema: dict[str, Any]) -> list[Any]:
    """Values of a key that are not its default."""
    if schema.get("type") == "boolean":
        return [not schema["default"]]
    if "enum" in schema:
        return [value for value in schema["enum"] if value != schema["default"]][:1]
    if isinstance(schema["default"], (int, float)):
        return [schema["default"] + 1]
    return []


def _trl_arguments(
    function: Any, config: RunConfig, folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    run = dataclasses.replace(config, grpo=MappingProxyType(settings))
    arguments: dict[str, Any] = function(run, folder, dict, has_eval=True)
    return arguments
