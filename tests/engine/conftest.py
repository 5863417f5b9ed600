"""Fixtures that open a small CPU engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_checkpoints
import pytest
import torch

from toolkit.engine.engine_options import EngineOptions
from toolkit.engine.open_engine import open_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from toolkit.engine.engine import Engine

SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "dtype": "float32",
    "max_lora_rank": 16,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_bytes": 1 << 26,
    # vLLM's default block on a CPU has 128 tokens. No sequence here is longer, so no prefix would
    # be cached.
    "block_size": 32,
}


def small_options(folder: Path | str, **changes: Any) -> EngineOptions:
    """Options of a small engine on ``folder``."""
    return EngineOptions(model=str(folder), **(SMALL | changes))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous_threads)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama checkpoint."""
    return engine_checkpoints.make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Iterator[Engine]:
    """An engine on the checkpoint of ``llama_folder``, shared by the tests of a module."""
    with open_engine(small_options(llama_folder)) as engine:
        yield engine


@pytest.fixture
def open_small() -> Callable[..., Engine]:
    """A function that opens another small engine: ``open_small(folder, **changes)``."""
    return lambda folder, **changes: open_engine(small_options(folder, **changes))
