"""FastLanguageModel: loading an adapter folder as a model, and loading the policy of a run file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.base.errors import ConfigValueError, InputError
from toolkit.config.run_config import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.policy.from_config import choose_engine, make_load_request
from toolkit.policy.language_model import FastLanguageModel, load_policy
from toolkit.policy.lora import adapter_tensors

if TYPE_CHECKING:
    from pathlib import Path


def test_an_adapter_folder_loads_base_and_trainable_adapter(
    adapted: Any, load: Any, tmp_path: Path, ids: Any
) -> None:
    model = adapted()
    loaded, tokenizer = load(model.save_lora(tmp_path / "a"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {name for name, value in loaded.named_parameters() if value.requires_grad} == {
        name for name, value in model.named_parameters() if value.requires_grad
    }
    assert tokenizer.padding_side == "left"
    assert loaded.is_gradient_checkpointing
    with pytest.warns(UserWarning, match="already has this adapter"):
        assert FastLanguageModel.get_peft_model(loaded, r=4, lora_alpha=8) is loaded
    before = {name: value.clone() for name, value in adapter_tensors(loaded).items()}
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    loaded(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert all(
        not torch.equal(before[name], value) for name, value in adapter_tensors(loaded).items()
    )


def test_an_adapter_whose_base_model_is_missing_is_refused(
    adapted: Any, load: Any, tmp_path: Path
) -> None:
    import json

    folder = adapted().save_lora(tmp_path / "a")
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_model_name_or_path": "/gone/model"}))
    with pytest.raises(InputError, match=r"/gone/model: the folder does not exist"):
        load(folder)
    path.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not name its base model"):
        load(folder)


def test_the_model_has_the_toolkits_methods(adapted: Any) -> None:
    model = adapted()
    for name in ("fast_generate", "save_lora", "load_lora"):
        assert callable(getattr(model, name))
    assert model.vllm_engine is None
    assert model.max_seq_length == 128


def test_get_peft_model_has_the_drop_in_signature() -> None:
    import inspect

    parameters = inspect.signature(FastLanguageModel.get_peft_model).parameters
    defaults = {name: value.default for name, value in parameters.items()}
    assert defaults.pop("loftq_config") in (None, {})
    del defaults["model"], defaults["kwargs"]
    assert defaults == {
        "r": 16,
        "target_modules": (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_gradient_checkpointing": "unsloth",
        "random_state": 3407,
        "max_seq_length": 2048,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


@pytest.fixture
def config(tiny: Path) -> RunConfig:
    return RunConfig(
        model=ModelSection(model_name=str(tiny), max_seq_length=128),
        lora=LoraSection(r=4, lora_alpha=8, use_gradient_checkpointing=False),
        runtime=RuntimeSection(engine="transformers"),
    )


def test_a_run_file_loads_the_same_policy_as_the_calls(config: RunConfig, load: Any) -> None:
    model, tokenizer = load_policy(config)
    expected_model = FastLanguageModel.get_peft_model(
        load()[0], r=4, lora_alpha=8, use_gradient_checkpointing=False
    )
    tensors, expected = adapter_tensors(model), adapter_tensors(expected_model)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert tokenizer.padding_side == "left"
    assert model.training


def test_a_run_file_with_full_finetuning_has_no_adapter(config: RunConfig) -> None:
    model, _ = load_policy(replace(config, model=replace(config.model, full_finetuning=True)))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_file_with_an_invalid_value_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigValueError, match="lora_dropout=1"):
        load_policy(replace(config, lora=replace(config.lora, lora_dropout=1)))


@pytest.mark.parametrize(
    ("engine", "fast", "expected"),
    [
        ("vllm", "auto", "vllm"),
        ("transformers", "auto", "transformers"),
        ("auto", True, "vllm"),
        ("auto", False, "transformers"),
    ],
)
def test_choose_engine_follows_the_run_file(
    config: RunConfig, engine: Any, fast: Any, expected: str
) -> None:
    run_config = replace(
        config,
        runtime=replace(config.runtime, engine=engine),
        model=replace(config.model, fast_inference=fast),
    )
    assert choose_engine(run_config) == expected


def test_choose_engine_with_auto_follows_the_machine(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_config = replace(config, runtime=replace(config.runtime, engine="auto"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine(run_config) == "transformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("toolkit.policy.machine_facts.vllm_available", lambda: True)
    assert choose_engine(run_config) == "vllm"


def test_engine_options_of_a_run_file_reach_the_engine(
    config: RunConfig, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.policy.engine_model import engine_options
    from toolkit.policy.model_files import find_checkpoint

    monkeypatch.setattr("toolkit.policy.load_request.vllm_available", lambda: True)
    section = replace(
        config.model,
        max_lora_rank=8,
        max_num_seqs=4,
        gpu_memory_utilization="auto",
        float8_kv_cache=True,
        enforce_eager=True,
        share_weights=False,
        enable_chunked_prefill=False,
    )
    run_config = replace(config, model=section, runtime=replace(config.runtime, engine="vllm"))
    options = engine_options(find_checkpoint(str(tiny)), make_load_request(run_config))
    assert options.max_lora_rank == 8
    assert options.max_num_seqs == 4
    assert options.max_num_batched_tokens == "auto"
    assert options.max_model_len == 128
    assert options.float8_kv_cache
    assert options.enforce_eager
    assert not options.share_weights
    assert options.to_vllm("cuda")["enable_chunked_prefill"] is False
    if not torch.cuda.is_available():
        assert options.dtype == "float32"
        assert options.gpu_memory_utilization == "auto"
