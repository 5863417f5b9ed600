"""``toolkit generate`` and ``toolkit export`` on a run folder.

The main uses run the installed command in a subprocess. The other tests call its entry point in
this process, which saves the seconds that importing torch takes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = Path(sys.executable).parent / "toolkit"


class CommandInProcess:
    """Calls the entry point of the command in this process, with the arguments of ``call``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: Any, stdin: str = "") -> subprocess.CompletedProcess[str]:
        import torch

        from toolkit.cli.train import main

        torch.set_num_threads(1)
        words = ["toolkit", *map(str, arguments)]
        self.monkeypatch.setattr(sys, "argv", words)
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self.capfd.readouterr()
        return subprocess.CompletedProcess(words, int(left.value.code or 0), out, err)


@pytest.fixture
def run_in_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> CommandInProcess:
    return CommandInProcess(monkeypatch, capfd)


def call(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    return subprocess.run(
        [str(TOOLKIT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in ``model``, and a run folder ``run`` with a finished adapter and
    checkpoint-7.

    The checkpoint's adapter differs from the finished adapter, so tests can distinguish them.
    """
    sys.path.append(str(ROOT / "tests" / "fixtures"))
    import torch
    from safetensors.torch import save_file
    from tiny_llama import make_tiny

    from toolkit.policy.language_model import FastLanguageModel
    from toolkit.train.checkpointing import checkpoint, trainer_state
    from toolkit.train.checkpointing.state_files import trainable_parameters

    folder = tmp_path_factory.mktemp("world")
    run = folder / "run"
    base = make_tiny(folder / "model", chat=True)
    model, _ = FastLanguageModel.from_pretrained(str(base), max_seq_length=128, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, use_gradient_checkpointing=False
    )
    generator = torch.Generator().manual_seed(1)

    def draw() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    draw()
    part = checkpoint.begin(run, 7)
    save_file(
        {name: p.detach().clone() for name, p in trainable_parameters(model).items()},
        part / trainer_state.ADAPTER_FILE,
    )
    checkpoint.commit(part, 7)
    draw()
    model.save_lora(run / "adapter")
    config = {
        "model": {"model_name": str(base), "max_seq_length": 128, "load_in_4bit": False},
        "lora": {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False},
        "dataset": {"path": "/moved/away.jsonl", "prompt": "question"},
        "reward": {"functions": [{"name": "exact_match"}]},
        "runtime": {"engine": "transformers", "output_dir": str(run)},
    }
    (run / "config.json").write_text(json.dumps(config))
    return folder


def greedy(folder: Path, text: str = "12+3=", adapter: Path | None = None) -> str:
    """The greedy answer of plain transformers, and of PEFT with ``adapter``: 12 tokens."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text).input_ids])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_generate_gives_the_answer_of_plain_peft(world: Path) -> None:
    result = call("generate", world / "run", "12+3=", "--max-tokens", 12)
    assert result.returncode == 0, result.stderr
    assert result.stdout == greedy(world / "model", adapter=world / "run" / "adapter") + "\n"
    assert result.stderr == ""


def test_generate_prints_several_answers_as_json(
    run_in_process: CommandInProcess, world: Path
) -> None:
    arguments = ("generate", world / "run", "-", "--max-tokens", 6, "-n", 2, "--temperature", 1.0)
    result = run_in_process(*arguments, "--seed", 5, "--json", stdin="1+1=\n2+2=\n")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["1+1=", "2+2="]
    assert all(len(row["completions"]) == 2 for row in rows)
    assert (
        run_in_process(*arguments, "--seed", 5, "--json", stdin="1+1=\n2+2=\n").stdout
        == result.stdout
    )


def test_generate_from_the_base_a_checkpoint_and_a_chat(
    run_in_process: CommandInProcess, world: Path
) -> None:
    answers = {
        name: run_in_process("generate", world / "run", "12+3=", "--max-tokens", 12, *extra)
        for name, extra in {
            "end": (),
            "base": ("--base",),
            "checkpoint": ("--checkpoint", 7),
            "chat": ("--chat",),
        }.items()
    }
    assert all(done.returncode == 0 for done in answers.values()), answers
    assert answers["base"].stdout == greedy(world / "model") + "\n"
    assert len({done.stdout for done in answers.values()}) == 4


def test_export_an_adapter_that_plain_peft_reads(
    run_in_process: CommandInProcess, world: Path, tmp_path: Path
) -> None:
    to = tmp_path / "out" / "adapter"
    result = run_in_process("export", world / "run", "--to", to)
    assert result.returncode == 0, result.stderr
    wrote, served = result.stdout.splitlines()
    assert wrote == f"wrote the adapter of {world / 'run' / 'adapter'} to {to}"
    assert served.startswith(f"serve it: vllm serve {world / 'model'} --max-model-len 128")
    assert served.endswith(f"--enable-lora --max-lora-rank 8 --lora-modules {to.name}={to}")
    expected = greedy(world / "model", adapter=world / "run" / "adapter")
    assert greedy(world / "model", adapter=to) == expected
    assert (to / "tokenizer.json").is_file()


def test_export_merged_weights_that_plain_transformers_loads(world: Path, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    result = call("export", world / "run", "--to", tmp_path / "merged", "--merge")
    assert result.returncode == 0, result.stderr
    assert "wrote merged weights of" in result.stdout
    ids = torch.tensor([[4, 5, 13, 6, 16]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    with torch.no_grad():
        base_logits = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, world / "run" / "adapter")(ids).logits
        merged_logits = merged(ids).logits
    assert torch.allclose(merged_logits, adapted, atol=1e-5)
    assert not torch.allclose(merged_logits, base_logits, atol=1e-2)


def test_export_from_a_checkpoint_of_an_unfinished_run(
    run_in_process: CommandInProcess, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    result = run_in_process("export", tmp_path / "run", "--to", tmp_path / "merged", "--merge")
    assert result.returncode == 0, result.stderr
    assert "checkpoint-7" in result.stdout
    from_checkpoint = run_in_process(
        "generate", world / "run", "12+3=", "--max-tokens", 12, "--checkpoint", 7
    )
    assert greedy(tmp_path / "merged") + "\n" == from_checkpoint.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "/nowhere", "hi"), 2, "is not a run folder: config.json is missing"),
        (("generate", "RUN"), 2, "Missing argument 'PROMPTS...'"),
        (("generate", "RUN", "hi", "--checkpoint", "9"), 1, "has no intact checkpoint-9"),
        (("generate", "RUN", "1" * 128), 1, "prompt 0 has 128 tokens"),
        (("generate", "RUN", os.fsdecode(b"\xff")), 2, "PROMPTS: a prompt is not UTF-8 text"),
        (("generate", "RUN", "hi", "--temperature", "-1"), 2, "--temperature"),
        (("export", "RUN"), 2, "Missing option '--to'"),
        (("export", "RUN", "--to", "RUN"), 1, "is not empty"),
        (("export", "RUN", "--to", "/proc/x"), 2, "cannot be written"),
        (("export", "RUN", "--to", "PIPE"), 1, "is a file"),
        (("export", "RUN", "--to", "PIPE", "--merge"), 1, "is a file"),
        (("export", "RUN", "--to", "LINK"), 1, "is a file"),
        (("export", "RUN", "--to", "OUT", "--dtype", "bfloat16"), 2, "--dtype needs --merge"),
    ],
)
def test_wrong_arguments_are_short_errors(
    run_in_process: CommandInProcess,
    world: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    places = {"RUN": str(world / "run"), "OUT": str(tmp_path / "out")}
    places |= {"PIPE": str(tmp_path / "pipe"), "LINK": str(tmp_path / "link")}
    result = run_in_process(*(places.get(argument, argument) for argument in arguments))
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_truncated_adapter_is_an_error_with_its_path(
    run_in_process: CommandInProcess, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    result = run_in_process("generate", tmp_path / "run", "hi")
    assert result.returncode == 2
    assert "adapter_model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


EVIL = """
import pathlib
from transformers import LlamaConfig

pathlib.Path(__file__).with_name("was-run").write_text("x")
pathlib.Path(FOLDER, "was-run").write_text("x")

class Mine(LlamaConfig):
    model_type = "mine"
"""


@pytest.mark.parametrize("command", ["generate", "export"])
def test_code_in_a_foreign_run_folder_is_not_run(
    run_in_process: CommandInProcess, world: Path, tmp_path: Path, command: str
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(world / "model", model)
    shutil.copytree(world / "run", run)
    (model / "mine.py").write_text(EVIL.replace("FOLDER", repr(str(tmp_path))))
    described = json.loads((model / "config.json").read_text())
    described |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(described))
    written = json.loads((run / "config.json").read_text())
    written["model"] |= {"model_name": str(model), "trust_remote_code": True}
    (run / "config.json").write_text(json.dumps(written))
    more = ("hi",) if command == "generate" else ("--to", tmp_path / "to", "--merge")
    result = run_in_process(command, run, *more)
    assert result.returncode == 1, result.stderr
    assert "runs code that comes with" in result.stderr
    assert "--trust-remote-code" in result.stderr
    assert not (tmp_path / "was-run").exists()
    run_in_process(command, run, *more, "--trust-remote-code")
    assert (tmp_path / "was-run").exists()
