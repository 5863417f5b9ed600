"""``generate``, ``export`` and ``export --merge`` on manipulated run folders and adapters. Each
command succeeds, or ends with one error message and writes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load_file, save_file
from test_generate_export import CommandInProcess, run_in_process, world  # noqa: F401, TC002 - fixtures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow
WEIGHTS = "adapter/adapter_model.safetensors"


def put(name: str, content: bytes) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_bytes(content)

    return change


def header(described: Any, size: int | None = None) -> Callable[[Path], None]:
    text = json.dumps(described).encode()
    return put(WEIGHTS, struct.pack("<Q", len(text) if size is None else size) + text)


def adapter_config(**values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def tensors(altered: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        weights = load_file(run / WEIGHTS)
        save_file({name: altered(value) for name, value in weights.items()}, run / WEIGHTS)

    return change


def config(section: str, **values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "config.json"
        described = json.loads(path.read_text())
        described.setdefault(section, {}).update(values)
        path.write_text(json.dumps(described))

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return change


def link(name: str, to: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(to)

    return change


HUGE = {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}
NEGATIVE = {"x": {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]}}
BACKWARDS = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}
PATTERN = "(a+)+$"
CASES: dict[str, Callable[[Path], None]] = {
    "weights with a header of exabytes": header({}, 1 << 60),
    "weights of a huge shape": header(HUGE),
    "weights of a negative shape": header(NEGATIVE),
    "weights that lie backwards": header(BACKWARDS),
    "weights nested deeply": put(WEIGHTS, struct.pack("<Q", 200_000) + b"[" * 200_000),
    "weights that are NaN": tensors(lambda value: value * float("nan")),
    "weights that are infinite": tensors(lambda value: value + float("inf")),
    "weights that are integers": tensors(lambda value: value.astype("int64")),
    "weights that are a pickle": put(WEIGHTS, b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
    "weights that are a pipe": pipe(WEIGHTS),
    "weights that are a device": link(WEIGHTS, "/dev/zero"),
    "a rank of a billion": adapter_config(r=10**9),
    "a negative rank": adapter_config(r=-4),
    "a rank of 0": adapter_config(r=0),
    "a rank that is a text": adapter_config(r="4"),
    "an alpha of NaN": adapter_config(lora_alpha=float("nan")),
    "an infinite alpha": adapter_config(lora_alpha=float("inf")),
    "an alpha beyond floats": adapter_config(lora_alpha=10**400),
    "a pattern without end": adapter_config(target_modules=PATTERN * 5),
    "a rank pattern without end": adapter_config(rank_pattern={"(.*.*.*.*.*.*)*x": 4}),
    "an excluding pattern": adapter_config(exclude_modules="(.*.*.*.*.*.*)*x"),
    "a million targets": adapter_config(target_modules=[f"m{n}" for n in range(10**6)]),
    "another kind of adapter": adapter_config(peft_type="EVIL"),
    "another class": adapter_config(
        auto_mapping={"base_model_class": "os", "parent_library": "os"}
    ),
    "layers many times over": adapter_config(layer_replication=[[0, 10**9]]),
    "tokens that are none": adapter_config(trainable_token_indices=[10**12]),
    "another start": adapter_config(init_lora_weights="pissa_niter_1000000000"),
    "modules to save": adapter_config(modules_to_save=["lm_head", "__class__"]),
    "a config that is a list": put("adapter/adapter_config.json", b"[]"),
    "a config nested deeply": put("adapter/adapter_config.json", b"[" * 10**6),
    "a config that is a pipe": pipe("adapter/adapter_config.json"),
    "a base that is a pipe": pipe("adapter/base.json"),
    "a base that is a list": put("adapter/base.json", b"[1]"),
    "a run that is a pipe": pipe("config.json"),
    "a run that is a device": link("config.json", "/dev/zero"),
    "a run nested deeply": put("config.json", b'{"a":' * 10**5),
    "a run of nothing": put("config.json", b"null"),
    "a model that is a pipe": config("model", model_name="/dev/stdin"),
    "a model that is a device": config("model", model_name="/dev/zero"),
    "a model of many positions": config("model", max_seq_length=10**15),
    "a model of negative positions": config("model", max_seq_length=-1),
    "a model of no type": config("model", dtype="float1"),
    "a model at a revision": config("model", revision="../../../x"),
    "a rank in the run": config("lora", r=10**9),
    "a key that is none": config("model", __class__="x"),
    "half a character": config("dataset", system="\ud800"),
}


COMMANDS = {
    "generate": ("12+3=", "--max-tokens", "2"),
    "export": ("--to", "TO"),
    "merge": ("--to", "TO", "--merge"),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_folders_end_in_one_message(
    run_in_process: CommandInProcess,  # noqa: F811
    world: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    for command, more in COMMANDS.items():
        run, to = tmp_path / f"run-{command}", tmp_path / f"to-{command}"
        shutil.copytree(world / "run", run)
        CASES[name](run)
        words = [str(to) if word == "TO" else word for word in more]
        result = run_in_process("generate" if command == "generate" else "export", run, *words)
        print(command, result.returncode, result.stderr[:300])
        assert result.returncode in (0, 1, 2), (command, result.stderr)
        assert "Traceback" not in result.stderr, command
        assert result.stderr.count("error: ") == (result.returncode != 0), (command, result.stderr)
        assert not (tmp_path / "pwned").exists()
        if result.returncode:
            assert not to.exists() or not any(to.iterdir()), command
