"""Fixtures with checkpoints and loaded models for the tests of toolkit.policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "fixtures"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one torch thread, because these models are too small for more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny checkpoint. Tests must not write to it."""
    from tiny_llama import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def load(tiny: Path) -> Any:
    """``load(**arguments)`` returns (model, tokenizer) of the tiny checkpoint: float32, 128
    tokens.
    """
    from toolkit.policy.language_model import FastLanguageModel

    def load_tiny(name: Path | str = tiny, **arguments: Any) -> Any:
        values = {"max_seq_length": 128, "load_in_4bit": False, **arguments}
        return FastLanguageModel.from_pretrained(str(name), **values)

    return load_tiny


@pytest.fixture
def adapted(load: Any) -> Any:
    """``adapted(**arguments)`` returns the tiny model with an adapter whose B is not zero."""
    import torch

    from toolkit.policy.language_model import FastLanguageModel

    def make_adapted(**arguments: Any) -> Any:
        model, _ = load()
        values = {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False, **arguments}
        peft_model = FastLanguageModel.get_peft_model(model, **values)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return peft_model

    return make_adapted


@pytest.fixture
def ids() -> Any:
    """(2, 20) token ids."""
    import torch

    return torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(0))
