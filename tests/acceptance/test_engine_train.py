"""``toolkit train`` with ``runtime.engine: vllm``: engine options of a run file, faults, bad input.

To cause a fault, the user's reward module, which the run imports, replaces a function of vLLM.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from spoiled_world import FinishedCommand, make_model, make_world, run_commands, run_toolkit

from toolkit.train.checkpointing import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engine
pytest.importorskip("vllm")

ENGINE = {"engine": "vllm"}
SHORT = {"max_steps": 4, "save_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8}
TWO_REWARDS = [{"name": "mine:score", "weight": 0.5}, {"name": "exact_match"}]
REGEX = "[1-9]{2,3}=(yes|no)"

FAULT = """\
import torch
from vllm.model_executor.models import llama

steps = 0
whole = llama.LlamaModel.forward

def score(completions, trainer_state, **kwargs):
    global steps
    steps = trainer_state.global_step + 1
    return [float(len(set(text))) for text in completions]

def forward(self, input_ids, *args, **kwargs):
    if {when}:
        raise {error}
    return whole(self, input_ids, *args, **kwargs)

llama.LlamaModel.forward = forward
"""
OOM = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"
LOST = "RuntimeError('CUDA error: uncorrectable ECC error encountered')"


@dataclass(frozen=True)
class Case:
    """``spoil`` changes files. The command must end with ``code`` and print ``messages``."""

    code: int
    messages: tuple[str, ...] = ()
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    spoil: Callable[[Path], Any] = lambda folder: None


def fault(when: str, error: str) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        (folder / "mine.py").write_text(FAULT.format(when=when, error=error))
        run = json.loads((folder / "run.yaml").read_text())
        run["reward"]["isolate"] = False  # the module patches the engine, in the run's process
        (folder / "run.yaml").write_text(json.dumps(run))

    return spoil


def copy_model(folder: Path) -> Path:
    """Replace the link to the shared model by a copy, which a test may change."""
    shared = (folder / "model").resolve()
    (folder / "model").unlink()
    shutil.copytree(shared, folder / "model")
    return folder / "model"


def architecture(folder: Path) -> None:
    path = copy_model(folder) / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM"))


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = copy_model(folder) / "model.safetensors"
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return spoil


DOWN = "model.layers.1.mlp.down_proj.weight"
EXTRA = "model.layers.0.self_attn.q_norm.weight"

QUICK = {
    "options": Case(
        0,
        changes={
            "reward": {"functions": TWO_REWARDS},
            "grpo": {
                **SHORT,
                "vllm_structured_outputs_regex": REGEX,
                "beta": 0.05,
                "max_completion_length": 8,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "generation_kwargs": {"min_tokens": 2, "logit_bias": {"3": 1.0}, "stop": ["+"]},
            },
            "dataset": {"eval_path": "train.jsonl"},
            "lora": {"use_gradient_checkpointing": True},
        },
    ),
    "memory for four": Case(
        0,
        ("rollout: out of memory with 8 sequences. From now on at most 4 run at a time",),
        {"grpo": SHORT},
        fault("steps > 1 and input_ids.shape[0] == 8", OOM),
    ),
    "lost GPU": Case(
        3,
        ("uncorrectable ECC error", "resumes from the last checkpoint"),
        {"grpo": SHORT},
        fault("steps > 1", LOST),
    ),
    "rank above max_lora_rank": Case(
        1, ("max_lora_rank", "16"), {"model": {"max_lora_rank": 8}, "lora": {"r": 16}}
    ),
    "no such target": Case(
        1, ("qq_proj", "target_modules"), {"lora": {"target_modules": ["qq_proj"]}}
    ),
    "trained head": Case(1, ("lm_head",), {"lora": {"target_modules": ["lm_head"]}}),
    "trained embedding": Case(1, ("embed_tokens",), {"lora": {"target_modules": ["embed_tokens"]}}),
    "unknown architecture": Case(1, ("NoSuchForCausalLM", "transformers"), {}, architecture),
}  # fmt: skip
SLOW = {
    "memory for none": Case(
        1,
        ("out of memory", "max_completion_length"),
        {"grpo": SHORT},
        fault("steps > 1", OOM),
    ),
    "engine error": Case(
        3, ("illegal memory access",), {"grpo": SHORT},
        fault("steps > 1", "RuntimeError('CUDA error: an illegal memory access was encountered')"),
    ),
    "missing tensor": Case(1, (DOWN,), {}, tensors(lambda found: found.pop(DOWN))),
    "extra tensor": Case(
        1,
        ("layers.0.self_attn.q_norm", "complete checkpoint"),
        {},
        tensors(lambda found: found.update({EXTRA: found[DOWN][0].clone()})),
    ),
    "misshapen tensor": Case(
        1,
        ("torch.Size([128])", "complete checkpoint"),
        {},
        tensors(lambda found: found.update({"model.norm.weight": found[DOWN][0].clone()})),
    ),
}  # fmt: skip
STOPPED = ("lost GPU", "engine error", "memory for none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def run(cases: dict[str, Case], root: Path, model: Path) -> dict[str, FinishedCommand]:
    requests = []
    for name, case in cases.items():
        changes = {**case.changes, "runtime": ENGINE}
        folder = make_world(root / name.replace(" ", "-"), model, **changes)
        case.spoil(folder)
        requests.append({"folder": folder, "arguments": ["train", "run.yaml"]})
    return dict(zip(cases, run_commands(requests, "toolkit.engine.start"), strict=True))


@pytest.fixture(scope="module")
def quick_results(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FinishedCommand]:
    return run(QUICK, tmp_path_factory.mktemp("quick"), model)


@pytest.fixture(scope="module")
def slow_results(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FinishedCommand]:
    return run(SLOW, tmp_path_factory.mktemp("slow"), model)


def check(case: Case, shown: FinishedCommand) -> None:
    assert shown.returncode == case.code, shown.stdout + shown.stderr
    for message in case.messages:
        assert message in shown.stderr, shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    assert "internal error" not in shown.stderr
    if case.code:
        assert "fix: " in shown.stderr


def check_stopped(ended: FinishedCommand) -> None:
    """Check that the run completed two steps and that their checkpoint is intact."""
    assert [row["step"] for row in ended.rows()] == [1, 2]
    assert checkpoint.find_faults(ended.folder / "out" / "checkpoint-2") == []
    assert not (ended.folder / "out" / "checkpoint-3").exists()


@pytest.mark.parametrize("name", QUICK)
def test_a_run_on_the_engine(quick_results: dict[str, FinishedCommand], name: str) -> None:
    check(QUICK[name], quick_results[name])
    if name in STOPPED:
        check_stopped(quick_results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_run_whose_engine_fails_at_the_start_or_in_a_step(
    slow_results: dict[str, FinishedCommand], name: str
) -> None:
    check(SLOW[name], slow_results[name])
    if name in STOPPED:
        check_stopped(slow_results[name])


def test_the_logs_of_a_run_with_engine_options(quick_results: dict[str, FinishedCommand]) -> None:
    run = quick_results["options"]
    completions = run.rows("completions.jsonl")
    assert len(completions) == 32
    assert all(re.fullmatch(REGEX, row["completion"]) for row in completions), completions[:3]
    for row in completions:
        parts = row["rewards"]
        assert row["reward"] == pytest.approx(0.5 * parts["score"] + parts["exact_match"])
    metrics = run.rows()
    trained = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert all("kl" in row and "sampling/logp_gap_max" in row for row in trained)
    assert [row["step"] for row in metrics if "eval/reward" in row] == [2, 4]


@pytest.mark.slow
def test_a_run_file_gives_the_same_run_in_every_process(model: Path, tmp_path: Path) -> None:
    """The command runs in two processes, with different string hashes and thread timing."""
    digests = []
    for name in ("1", "2"):
        folder = make_world(tmp_path / name, model, grpo=SHORT, runtime=ENGINE)
        result = run_toolkit(folder, "train", "run.yaml", env={"PYTHONHASHSEED": name})
        assert result.returncode == 0, result.stderr
        out = folder / "out"
        files = ("metrics.jsonl", "completions.jsonl", "adapter/adapter_model.safetensors")
        digests.append([(out / file).read_bytes() for file in files])
    assert digests[0] == digests[1]


def test_running_out_of_memory_in_a_rollout_loses_no_completion(
    quick_results: dict[str, FinishedCommand],
) -> None:
    run = quick_results["memory for four"]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert len(run.rows("completions.jsonl")) == 32
    assert run.stderr.count("rollout: out of memory") == 1
