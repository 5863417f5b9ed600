"""Saved adapters: plain PEFT loads them, equal adapters give equal bytes, and a failed save keeps
the previous adapter.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.base.errors import ConfigError, ConfigValueError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"


def _file_contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_plain_peft_loads_the_adapter_and_computes_equal_logits(
    adapted: Any, tiny: Path, tmp_path: Path, ids: Any
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    for number, rslora in enumerate((False, True)):
        model = adapted(use_rslora=rslora)
        folder = model.save_lora(tmp_path / str(number))
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
        assert torch.equal(plain(ids).logits, model(ids).logits)
        with plain.disable_adapter():
            assert not torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*embed.*:UserWarning")
@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["up_proj"]},
        {"init_lora_weights": "orthogonal"},
        {"use_rslora": True, "lora_alpha": 3},
    ],
)
def test_every_kind_of_adapter_is_saved_and_loaded_unchanged(
    adapted: Any, load: Any, tmp_path: Path, ids: Any, values: dict[str, Any]
) -> None:
    model = adapted(**values)
    loaded, _ = load(model.save_lora(tmp_path / "a"), use_gradient_checkpointing=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert [name for name, value in loaded.named_parameters() if value.requires_grad] == trainable


def test_equal_adapters_give_equal_bytes(adapted: Any, tmp_path: Path) -> None:
    first = _file_contents(adapted().save_lora(tmp_path / "a"))
    second = _file_contents(adapted().save_lora(tmp_path / "b"))
    assert first == second
    assert {WEIGHTS, "adapter_config.json", "base.json"} <= first.keys()
    config = json.loads(first["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"])


def test_saving_again_replaces_the_adapter_and_leaves_no_other_file(
    adapted: Any, tmp_path: Path
) -> None:
    model = adapted()
    model.save_lora(tmp_path / "a")
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).add_(1)
    before = _file_contents(tmp_path / "a")
    model.save_lora(str(tmp_path / "a"))
    after = _file_contents(tmp_path / "a")
    assert after[WEIGHTS] != before[WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "a").iterdir())


def test_a_failed_save_keeps_the_previous_adapter(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    before = _file_contents(model.save_lora(tmp_path / "a"))

    def raise_disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", raise_disk_full)
    with pytest.raises(ConfigError, match="No space left on device"):
        model.save_lora(tmp_path / "a")
    assert _file_contents(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saving_a_model_without_an_adapter_is_an_error(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigValueError, match="no adapter to save"):
        load()[0].save_lora(tmp_path / "a")


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0, 0o644)])
def test_the_file_mode_follows_the_umask(
    adapted: Any, tmp_path: Path, umask: int, mode: int
) -> None:
    model = adapted()
    previous_umask = os.umask(umask)
    try:
        folder = model.save_lora(tmp_path / "a")
    finally:
        os.umask(previous_umask)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}
