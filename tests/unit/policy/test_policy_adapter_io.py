"""Adapters on disk: what plain PEFT reads, equal bytes, and every way in which a folder can be
wrong.
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


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_plain_peft_reads_it_and_gives_equal_logits(
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
def test_every_kind_comes_back_as_it_was(
    adapted: Any, load: Any, tmp_path: Path, ids: Any, values: dict[str, Any]
) -> None:
    model = adapted(**values)
    again, _ = load(model.save_lora(tmp_path / "a"), use_gradient_checkpointing=False)
    assert torch.equal(again(ids).logits, model(ids).logits)
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert [name for name, value in again.named_parameters() if value.requires_grad] == trainable


def test_equal_adapters_give_equal_bytes(adapted: Any, tmp_path: Path) -> None:
    first = _files(adapted().save_lora(tmp_path / "a"))
    second = _files(adapted().save_lora(tmp_path / "b"))
    assert first == second
    assert {WEIGHTS, "adapter_config.json", "base.json"} <= first.keys()
    config = json.loads(first["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"])


def test_saving_again_replaces_and_leaves_nothing_beside(adapted: Any, tmp_path: Path) -> None:
    model = adapted()
    model.save_lora(tmp_path / "a")
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).add_(1)
    before = _files(tmp_path / "a")
    model.save_lora(str(tmp_path / "a"))
    after = _files(tmp_path / "a")
    assert after[WEIGHTS] != before[WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "a").iterdir())


def test_a_failed_save_leaves_the_old_one(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    before = _files(model.save_lora(tmp_path / "a"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        model.save_lora(tmp_path / "a")
    assert _files(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_model_without_an_adapter_has_nothing_to_save(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigValueError, match="no adapter to save"):
        load()[0].save_lora(tmp_path / "a")


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0, 0o644)])
def test_an_adapter_is_as_open_as_the_umask_allows(
    adapted: Any, tmp_path: Path, umask: int, mode: int
) -> None:
    model = adapted()
    before = os.umask(umask)
    try:
        folder = model.save_lora(tmp_path / "a")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}
