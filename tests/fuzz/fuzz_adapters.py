"""Read adapters with arbitrary content: the result must be an adapter or a ToolkitError, in time.

python tests/fuzz/fuzz_adapters.py [20000] [--seconds 3600] [--seed 0] [--workers 2]
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fuzz_loop import Change, Round, change, main, measure_seconds, mutate, run_inputs
from hypothesis import strategies as st
from safetensors.torch import save

from toolkit.base.errors import ToolkitError
from toolkit.policy.adapter_io import BASE_FILE
from toolkit.policy.model_files import ADAPTER_CONFIG
from toolkit.policy.saved_adapter import ADAPTER_WEIGHTS, read_adapter

MEGABYTES = 1500.0
GOOD = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
    "target_modules": ["q_proj"], "base_model_name_or_path": "base",
}  # fmt: skip
TENSORS = save(
    {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(4, 2),
    }
)
KEYS = [
    *GOOD, "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern", "revision",
    "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "lora_bias",
    "exclude_modules", "loftq_config", "eva_config", "corda_config", "trainable_token_indices",
    "auto_mapping", "peft_version", "inference_mode", "runtime_config", "layer_replication", "x",
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
words = st.sampled_from(["all-linear", "q_proj", "LORA", "IA3", "none", "all", "olora", "("])
values = scalars | words | st.lists(scalars | words, max_size=3)
values = values | st.dictionaries(st.text(max_size=6), values, max_size=2)
CONFIG = st.dictionaries(st.sampled_from(KEYS), values, max_size=3)
RAW_CONFIGS = st.sampled_from(
    [None] * 5 + [b"", b"[]", b"null", b"[" * 9000, b'{"r": ' + b"9" * 9000 + b"}"]
)
INPUT = (
    CONFIG,
    RAW_CONFIGS,
    st.lists(change, max_size=2),
    st.lists(change, max_size=2),
    st.none()
    | st.binary(max_size=20)
    | st.dictionaries(st.text(max_size=5), scalars).map(lambda value: json.dumps(value).encode()),
)


def check_input(
    folder: Path,
    config: dict[str, Any],
    whole: bytes | None,
    in_config: list[Change],
    in_weights: list[Change],
    base: bytes | None,
) -> float:
    """Write and read one adapter folder, and return the processor time in seconds."""
    text = json.dumps(GOOD | config).encode() if whole is None else whole
    (folder / ADAPTER_CONFIG).write_bytes(mutate(text, in_config[1:]))
    (folder / ADAPTER_WEIGHTS).write_bytes(mutate(TENSORS, in_weights[:-1]))
    (folder / BASE_FILE).unlink(missing_ok=True)
    if base is not None:
        (folder / BASE_FILE).write_bytes(base)
    return measure_seconds(lambda: _read(folder))


def _read(folder: Path) -> None:
    with contextlib.suppress(ToolkitError):
        read_adapter(folder)


def run_round(one: tuple[int, int]) -> Round:
    """Check one round of inputs: ``one`` is (number of inputs, seed)."""
    with tempfile.TemporaryDirectory() as folder:
        return run_inputs(lambda *drawn: check_input(Path(folder), *drawn), *one, *INPUT)


if __name__ == "__main__":
    sys.exit(main(run_round, "Adapters:", count=20_000, megabytes=MEGABYTES))
