"""A run that starts from an adapter: the settings that come from the adapter, and the adapters that
are refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny

from toolkit.base.errors import ConfigError, ConfigTypeError, ConfigValueError, UnsupportedError
from toolkit.config import load_run
from toolkit.policy.language_model import FastLanguageModel, load_policy
from toolkit.policy.lora import adapter_tensors
from toolkit.sizing import read_spec, solve

RUN_FILE = """\
model: {{model_name: {model}, max_seq_length: 64}}
lora: {{{lora}}}
dataset: {{path: train.jsonl}}
reward: {{functions: [{{name: exact_match}}]}}
grpo: {{max_completion_length: 16, max_steps: 1}}
runtime: {{engine: transformers}}
"""
PATTERNS = "rank_pattern: {q_proj: 6}, alpha_pattern: {q_proj: 3}, exclude_modules: [down_proj]"


def read_run(folder: Path, lora: str, model: Path | None = None) -> Any:
    (folder / "train.jsonl").write_text(8 * '{"prompt": "1+1="}\n')
    path = folder / "run.yaml"
    path.write_text(RUN_FILE.format(model=model or folder / "model", lora=lora))
    return load_run(path)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with an adapter of this model from a run file with patterns."""
    folder = tmp_path_factory.mktemp("first")
    make_tiny(folder / "model")
    config = read_run(
        folder, f"r: 4, lora_alpha: 8, target_modules: [q_proj, down_proj], {PATTERNS}"
    )
    policy, _ = load_policy(config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    policy.save_lora(folder / "adapter")
    return folder


def test_patterns_in_a_run_file_set_ranks_and_scaling(first_run: Path) -> None:
    config = read_run(
        first_run, f"r: 4, lora_alpha: 8, target_modules: [q_proj, o_proj], {PATTERNS}"
    )
    policy, _ = load_policy(config)
    ranks = {name.split(".")[-3]: value.shape[0] for name, value in adapter_tensors(policy).items()
             if ".lora_A." in name}  # fmt: skip
    assert ranks == {"q_proj": 6, "o_proj": 4}
    layer = policy.get_base_model().model.layers[0].self_attn
    assert (layer.q_proj.scaling["default"], layer.o_proj.scaling["default"]) == (0.5, 2.0)
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    spec = read_spec(config.model.model_name)
    assert solve(config, spec, None).model.trainable_parameters == trainable
    one_layer = replace(config, lora=replace(config.lora, layers_to_transform=(1,)))
    assert solve(one_layer, spec, None).model.trainable_parameters == trainable // 2


def test_missing_settings_come_from_the_adapter(first_run: Path) -> None:
    config = read_run(first_run, "adapter_path: adapter, use_gradient_checkpointing: false")
    section = config.lora
    assert (section.r, section.lora_alpha, section.largest_rank) == (4, 8, 6)
    assert section.target_modules == ("down_proj", "q_proj")
    assert dict(section.rank_pattern) == {"q_proj": 6}
    policy, _ = load_policy(config)
    trainable = {n: v for n, v in policy.named_parameters() if v.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert any(bool((v == 0.01).all()) for n, v in trainable.items() if "lora_B" in n)
    assert policy.training


def test_the_recorded_run_has_the_adapters_settings(first_run: Path, tmp_path: Path) -> None:
    from toolkit.train.checkpointing.run_directory import write_config

    config = read_run(first_run, "adapter_path: adapter")
    assert load_run(write_config(tmp_path, config)).lora == config.lora


def test_an_adapter_of_another_base_model_is_refused(first_run: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "model", seed=1)
    config = read_run(first_run, "adapter_path: adapter", other)
    with pytest.raises(ConfigValueError, match="was trained on"):
        load_policy(config)


def test_other_settings_are_refused(first_run: Path) -> None:
    config = read_run(first_run, "adapter_path: adapter")
    other = replace(config, lora=replace(config.lora, r=8))
    with pytest.raises(ConfigTypeError, match="r is 4 in the adapter, but 8 is requested"):
        load_policy(other)


@pytest.mark.parametrize("value", [{"q_proj": 0}, {"q_proj": 1.5}, {"q_proj(": 2}])
def test_invalid_patterns_are_refused(first_run: Path, value: Any) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(first_run / "model"), max_seq_length=64, load_in_4bit=False
    )
    with pytest.raises(ConfigValueError, match="rank_pattern"):
        FastLanguageModel.get_peft_model(model, rank_pattern=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "initialized with pissa, which rewrote the base weights"),
        ({"target_parameters": ["q_proj.weight"]}, "the adapter sets target_parameters"),
    ],
)
def test_adapters_that_cannot_start_a_run_are_refused(
    first_run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """The rule LORA040 refuses the adapter. If a run is started without the validator, the loader
    refuses it.
    """
    config = read_run(first_run, "adapter_path: adapter")
    folder = Path(shutil.copytree(first_run / "adapter", tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ConfigError, match=rf"LORA040\] lora.adapter_path: .*{message}"):
        read_run(first_run, f"adapter_path: {folder}")
    other = replace(config, lora=replace(config.lora, adapter_path=str(folder)))
    with pytest.raises(UnsupportedError, match=message):
        load_policy(other)
