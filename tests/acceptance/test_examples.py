"""The examples: run files validate without an error, and examples that need no GPU run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RUN_FILES = sorted(EXAMPLES.rglob("run.yaml"))
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
from tiny_llama import make_tiny  # noqa: E402 - in tests/fixtures

SMALL = ("grpo.max_steps=1", "grpo.per_device_train_batch_size=8", "grpo.max_completion_length=8")


def command(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one command as a user types it, without network access to the Hugging Face Hub."""
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **environ}
    program = {"python": sys.executable}.get(words[0], Path(sys.executable).with_name(words[0]))
    return subprocess.run(
        [program, *words[1:]], cwd=cwd, env=known, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of all examples, with the dataset that make_data.py writes."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    made = command("python", "make_data.py", cwd=tmp_path / "examples" / "math-word-problems")
    assert (made.returncode, made.stderr) == (0, "")
    return tmp_path / "examples"


def test_each_run_file_validates(copy: Path) -> None:
    assert RUN_FILES
    for file in RUN_FILES:
        folder = copy / file.parent.relative_to(EXAMPLES)
        cards = {"several-gpus": "4", "70b-on-eight-gpus": "8"}.get(folder.name, "1")
        size = ("--world-size", cards)
        result = command("envcheck", "validate", *size, "run.yaml", cwd=folder)
        assert result.returncode == 0, result.stdout
        assert "in run.yaml" in result.stdout  # the line that counts findings
        assert "error[" not in result.stdout
        # The model is not on this machine; everything else about the file is checked.
        assert set(rules_in_output(result.stdout)) <= {"MODEL001"}, result.stdout


def rules_in_output(output: str) -> list[str]:
    """Ids of the findings in a report."""
    return [line.split("[")[1].split("]")[0] for line in output.split("\n") if "warning[" in line]


def test_every_folder_has_a_short_readme() -> None:
    folders = [folder for folder in EXAMPLES.iterdir() if folder.is_dir()]
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for folder in folders:
        lines = (folder / "README.md").read_text(encoding="utf-8").split("\n")
        assert 12 <= len(lines) <= 35, folder.name
        assert f"({folder.name}/)" in listed


def test_the_container_example_names_existing_files(copy: Path) -> None:
    """The Slurm script exists, is valid bash, and reads the variables of the example. The command
    in the container uses the run file of math-word-problems.
    """
    folder = EXAMPLES / "container-and-slurm"
    text = (folder / "README.md").read_text(encoding="utf-8")
    batch = next(line for line in text.split("\n") if " sbatch " in line).split()
    script = folder / batch[batch.index("sbatch") + 1]
    subprocess.run(["bash", "-n", str(script)], check=True)
    read = script.read_text(encoding="utf-8")
    for word in batch[: batch.index("sbatch")]:
        assert f"${{{word.partition('=')[0]}:-" in read
    image = next(word for word in text.split() if word.startswith("localhost/"))
    assert image in (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    started = text[text.index(image) :].split("\n")[0].split()[1:]
    assert started == ["toolkit", "train", batch[-1]]
    run = copy / "math-word-problems"
    result = command("envcheck", "validate", started[-1], cwd=run)
    assert result.returncode == 0, result.stdout


def test_the_several_gpus_example_gives_each_gpu_64_completions(copy: Path, tmp_path: Path) -> None:
    """``envcheck size`` chooses the number of completions that the README of the example states."""
    shapes = json.loads((ROOT / "tests/fixtures/sizing/shapes.json").read_text(encoding="utf-8"))
    shape = next(one for one in shapes if one["id"] == "Qwen/Qwen2.5-1.5B-Instruct")
    (tmp_path / "config.json").write_text(json.dumps(shape["config"]))
    result = command(
        "envcheck", "size", "run.yaml", "--world-size", "4", "--gpu", "4090", "--json",
        "--set", f"model.model_name={tmp_path}", cwd=copy / "several-gpus",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    chosen = json.loads(result.stdout)["choice"]
    each = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    assert (each, chosen["tensor_parallel_size"]) == (64, 1)
    readme = (EXAMPLES / "several-gpus" / "README.md").read_text(encoding="utf-8")
    assert "256 are 64 on each of four GPUs" in readme


@pytest.mark.slow
def test_the_own_reward_example_trains_a_small_model(copy: Path, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    changes = (f"model.model_name={model}", "runtime.engine=transformers", *SMALL)
    sets = [word for change in changes for word in ("--set", change)]
    result = command("toolkit", "train", "run.yaml", *sets, cwd=copy / "own-reward")
    assert result.returncode == 0, result.stdout + result.stderr
    run = copy / "own-reward" / "runs" / "own-reward"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert '"share"' in (run / "completions.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_drop_in_script_example_trains_and_samples(copy: Path, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    result = command(
        "python", "train.py", str(model), "--steps", "1", "--no-engine", cwd=copy / "drop-in-script"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    saved = copy / "drop-in-script" / "runs" / "script" / "adapter" / "adapter_config.json"
    assert saved.is_file()


@pytest.mark.slow
def test_the_tools_example_trains_a_small_model(copy: Path, tmp_path: Path) -> None:
    """Any text of the small model is a tool call with wrong arguments, so each call fails."""
    from tiny_llama import make_tokenizer

    model, tokenizer = make_tiny(tmp_path / "model"), make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}({{ c['function']['name'] }}"
        "{% for k, v in c['function']['arguments'].items() %} {{ k }} {{ v }}{% endfor %})"
        "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    call = {"name": "add", "arguments": {"a": "{said}"}}
    calls = {"open_pattern": "(?P<said>.+)", "repeats": True, "content": "text"}
    calls["transform"] = {"type": "function", "function": call}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<a>",
        "fields": {"tool_calls": calls, "content": {"content": "text"}},
    }
    tokenizer.save_pretrained(model)
    changes = (f"model.model_name={model}", "runtime.engine=transformers", *SMALL)
    lengths = ("model.max_seq_length=256", "grpo.max_prompt_length=120")
    changes += (*lengths, "grpo.max_completion_length=128")
    sets = [word for change in changes for word in ("--set", change)]
    result = command("toolkit", "train", "run.yaml", *sets, cwd=copy / "tools")
    assert result.returncode == 0, result.stdout + result.stderr
    log = copy / "tools" / "runs" / "tools" / "tool_calls.jsonl"
    assert "missing a required argument" in log.read_text(encoding="utf-8")
