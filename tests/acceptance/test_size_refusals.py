"""``envcheck size`` with invalid arguments, models or GPUs, and ``envcheck calibrate``."""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from size_world import ONE_B, SHAPES, make_model, run_envcheck

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import cases


@pytest.fixture
def model(tmp_path):
    """A function that makes a model folder with a real config and no weights."""
    return partial(make_model, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{model}", "--gpu", "h2000"], 1, "did you mean"),
        (["{model}", "--gpu", "h200", "--cpu"], 2, "mutually exclusive"),
        (["{model}", "--write", "--gpu", "h200"], 2, "needs a run file"),
        (["{model}", "--set", "lora.rank=3"], 1, "lora.rank"),
        (["{model}", "--set", "lora.r=x"], 1, "must be an integer"),
        (["{model}", "--set", "lora"], 1, "an override must have the form key=value"),
        (["{model}", "--set", "lora.target_modules='('"], 1, "not a regular expression"),
        (
            ["{model}", "--set", "lora.use_gradient_checkpointing=maybe"],
            1,
            "maybe is not one of auto, unsloth, and not true or false",
        ),
        (["no/such/folder/at/all"], 2, "neither an existing folder"),
        (["nobody/Nothing"], 2, "nor in the cache"),
        (["{model}", "--gpu", "h200", "--set", "lora.r=1000"], 1, "512"),
    ],
)
def test_impossible_arguments_are_errors(model, arguments, code, words):
    filled = [part.format(model=model(ONE_B)) for part in arguments]
    assert words in run_envcheck("size", *filled, code=code).stderr


def test_an_unusable_gpu_is_reported(model, tmp_path):
    case, folder = cases.load("driver-mismatch"), str(model(ONE_B))
    sized = case.envcheck(tmp_path, "size", folder)
    assert "driver and library do not match" in sized.stderr
    assert "sized for the CPU" in sized.stderr
    asked = case.envcheck(tmp_path, "size", folder, "--gpu-index", "0")
    assert asked.returncode == 1
    assert "GPU 0 was requested, but driver and library do not match" in asked.stderr


HOSTILE = {
    "a truncated config": lambda folder: (folder / "config.json").write_text('{"model_type": "ll'),
    "a huge vocabulary": lambda folder: (folder / "config.json").write_text(
        json.dumps({**SHAPES[ONE_B]["config"], "vocab_size": 2**60})
    ),
    "a header of 2**60": lambda folder: (folder / "model.safetensors").write_bytes(
        (1 << 60).to_bytes(8, "little") + b"{}"
    ),
    "a pipe": lambda folder: os.mkfifo(folder / "model.safetensors"),
    "a loop": lambda folder: (folder / "model.safetensors").symlink_to("model.safetensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_model_files_are_errors(model, name):
    folder = model(ONE_B)
    HOSTILE[name](folder)
    start = time.monotonic()
    result = run_envcheck("size", folder, "--gpu", "h200", code=2)
    assert time.monotonic() - start < 5
    assert str(folder) in result.stderr


def test_calibrate_compares_predicted_and_measured_memory(tmp_path, model):
    sizing = json.loads(run_envcheck("size", model(ONE_B), "--gpu", "h200", "--json").stdout)
    folder = tmp_path / "run"
    folder.mkdir()
    run_envcheck("calibrate", folder, code=2)
    (folder / "preflight.json").write_text(json.dumps({"sizing": sizing}))
    assert "not measured: the run was not on a GPU" in run_envcheck("calibrate", folder).stdout
    peak = sizing["peaks"]["torch_bytes"]
    (folder / "timings.jsonl").write_text(json.dumps({"step": 1, "peak_memory_bytes": peak}))
    text = run_envcheck("calibrate", folder).stdout
    assert "+0.0%" in text
    assert "within the predicted bound" in text
    above = sizing["peaks"]["bound_bytes"] + 1
    (folder / "timings.jsonl").write_text(json.dumps({"step": 1, "peak_memory_bytes": above}))
    assert "above the predicted bound" in run_envcheck("calibrate", folder, code=1).stdout
    rows = json.loads(run_envcheck("calibrate", folder, "--json", code=1).stdout)["rows"]
    assert {"peak.torch", "engine.kv"} <= {row["term"] for row in rows}
