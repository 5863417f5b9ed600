"""``envcheck validate``: output, exit codes, files, overrides and options."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from validate_world import PARTS, VALID_RUN_FILE, envcheck

if TYPE_CHECKING:
    from pathlib import Path


def test_the_output_of_a_finding_is_as_documented(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        VALID_RUN_FILE + "grpo:\n  num_generations: 8\n  per_device_train_batch_size: 1\n"
        "  gradient_accumulation_steps: 4\n",
        encoding="utf-8",
    )
    result = envcheck("validate", "run.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == (
        "run.yaml:5:20: error[GRPO001] grpo.num_generations: the generation batch of 4 "
        "completions is not a multiple of 8 completions per prompt\n"
        "    5 |   num_generations: 8\n"
        "  batch = per_device_train_batch_size 1 (line 6) x gradient_accumulation_steps 4 (line 7) "
        "x world size 1 (default)\n"
        "  fix: gradient_accumulation_steps: 8   or   num_generations: 2\n"
        "1 error in run.yaml\n"
    )
    assert result.stderr == ""


def test_a_rank_above_max_lora_rank_is_an_error_with_both_lines(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        VALID_RUN_FILE.replace("max_seq_length: 1024", "max_lora_rank: 64") + "lora:\n  r: 65\n",
        "utf-8",
    )
    result = envcheck("validate", run)
    assert result.returncode == 1
    assert "error[LORA003] lora.r: 65 is more than max_lora_rank 64" in result.stdout
    assert "r 65 (line 5) > max_lora_rank 64 (line 1)" in result.stdout
    assert "fix: max_lora_rank: 128   or   r: 64" in result.stdout


def test_all_faults_of_a_run_file_are_listed(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{model_name: {PARTS}/model, max_lora_rank: 24, max_seq_length: 99999}}\n"
        f"dataset: {{path: {PARTS}/train.jsonl, prompt: qestion}}\n"
        "reward: {functions: [{name: exact_mach}, {weight: 2}]}\n"
        "lora: {r: 8.0, bias: nne, lora_alfa: 4}\n"
        "grpo:\n  beta:\n  beta: 1\n  learning_rate: 5e-6\n  temperature: 0\n  num_generations: 8\n"
        "  per_device_train_batch_size: 3\n  use_vllm: true\n  max_new_tokens: 9\n"
        "runtime: {engine: vlm}\n",
        encoding="utf-8",
    )
    result = envcheck("validate", run, "--set", "grpo.top_p=2", "--set", "lora", "--format", "json")
    rules = sorted(found["rule"] for found in json.loads(result.stdout)["findings"])
    assert rules == sorted(
        ["LORA002", "LEN002", "DATA001", "REWARD001", "KEY002", "KEY003", "KEY004", "KEY001",
         "KEY006", "DOC002", "DOC007", "GRPO021", "GRPO001", "KEY007", "KEY009", "KEY004",
         "GRPO022", "DOC012"]
    )  # fmt: skip
    assert result.returncode == 1


def test_exit_codes(tmp_path: Path) -> None:
    good, bad, warned = (tmp_path / name for name in ("good.yaml", "bad.yaml", "warned.yaml"))
    good.write_text(VALID_RUN_FILE, "utf-8")
    bad.write_text(VALID_RUN_FILE + "lora: {r: 0}\n", "utf-8")
    warned.write_text(VALID_RUN_FILE + "lora: {lora_dropout: 0.1}\n", "utf-8")
    hub = tmp_path / "hub.yaml"
    hub.write_text(VALID_RUN_FILE.replace(f"{PARTS}/model", "nobody/has-this"), "utf-8")
    assert envcheck("validate", good).returncode == 0
    assert envcheck("validate", bad).returncode == 1
    assert envcheck("validate", warned).returncode == 0
    assert envcheck("validate", warned, "--strict").returncode == 1
    assert envcheck("validate", tmp_path / "missing.yaml").returncode == 2
    assert envcheck("validate", good, bad, tmp_path / "missing.yaml").returncode == 2
    assert envcheck("validate").returncode == 2
    assert envcheck("validate", good, "--world-size", "0").returncode == 2
    # The model is not on this machine. This is not an error, but --strict exits with 5.
    assert envcheck("validate", hub).returncode == 0
    assert envcheck("validate", hub, "--strict").returncode == 5
    assert envcheck("validate", hub, bad, "--strict").returncode == 1


def test_standard_input_folders_and_globs(tmp_path: Path) -> None:
    result = envcheck("validate", "-", stdin=VALID_RUN_FILE + "lora: {r: 0}\n", cwd=tmp_path)
    assert (result.returncode, result.stdout.split(":")[0]) == (1, "<stdin>")
    as_json = json.dumps({"model": {"model_name": f"{PARTS}/model"}, "lora": {"r": 0}})
    assert "<stdin>:1:" in envcheck("validate", "-", stdin=as_json).stdout
    nested = tmp_path / "runs" / "deep"
    nested.mkdir(parents=True)
    (nested / "a.yaml").write_text(VALID_RUN_FILE, "utf-8")
    (tmp_path / "runs" / "b.toml").write_text('[lora]\nr = 0\n[model]\nmodel_name = "x"\n', "utf-8")
    (tmp_path / "runs" / "data.json").write_text('{"rows": []}', "utf-8")
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "runs" / ".hidden" / "c.yaml").write_text("x: 1", "utf-8")
    report = json.loads(envcheck("validate", "runs", "--format", "json", cwd=tmp_path).stdout)
    assert report["files"] == ["runs/b.toml", "runs/deep/a.yaml"]
    report = json.loads(
        envcheck("validate", "runs/**/*.yaml", "--format", "json", cwd=tmp_path).stdout
    )
    assert report["files"] == ["runs/deep/a.yaml"]
    assert envcheck("validate", "*.yaml", cwd=tmp_path).returncode == 2
    (tmp_path / "empty").mkdir()
    assert envcheck("validate", "empty", cwd=tmp_path).returncode == 2


def test_overrides_are_checked_and_named(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(VALID_RUN_FILE, "utf-8")
    result = envcheck(
        "validate", run, "--set", "lora.r=0", "--set", "reward.functions.0.weight=high"
    )
    assert result.returncode == 1
    assert "--set lora.r=0: error[LORA001] lora.r: 0 is not a valid rank" in result.stdout
    assert "--set reward.functions.0.weight=high: error[KEY003]" in result.stdout
    assert "(--set)" in envcheck("validate", run, "--set", "grpo.max_completion_length=900",
                                 "--set", "grpo.max_prompt_length=900").stdout  # fmt: skip
    mended = envcheck("validate", run, "--set", "model.max_seq_length=768")
    assert (mended.returncode, mended.stdout) == (0, f"no findings in {run}\n")


def test_extended_files_keep_their_positions_and_cycles_are_errors(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "one.yaml").write_text(VALID_RUN_FILE + "lora:\n  r: 0\n", "utf-8")
    (tmp_path / "two.yaml").write_text("extends: base/one.yaml\ngrpo: {beta: 0.1}\n", "utf-8")
    run = tmp_path / "run.yaml"
    run.write_text("extends: two.yaml\nmodel: {max_seq_length: 99999}\n", "utf-8")
    result = envcheck("validate", "run.yaml", cwd=tmp_path)
    assert "base/one.yaml:5:6: error[LORA001]" in result.stdout
    assert "run.yaml:2:25: error[LEN002]" in result.stdout
    (tmp_path / "two.yaml").write_text("extends: run.yaml\n", "utf-8")
    result = envcheck("validate", "run.yaml", cwd=tmp_path)
    assert "DOC011" in result.stdout
    assert "run.yaml -> two.yaml -> run.yaml" in result.stdout


def test_world_size_and_gpu_options_are_applied(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        VALID_RUN_FILE + "grpo: {num_generations: 6, per_device_train_batch_size: 2}\n", "utf-8"
    )
    assert envcheck("validate", run).returncode == 1
    assert envcheck("validate", run, "--world-size", "3").returncode == 0
    run.write_text(VALID_RUN_FILE.replace("max_seq", "load_in_4bit: true, max_seq"), "utf-8")
    assert envcheck("validate", run).returncode == 0
    result = envcheck("validate", run, "--gpu", "none")
    assert (result.returncode, "there is no GPU" in result.stdout) == (1, True)
    result = envcheck("validate", run, "--gpu", "no-such-card")
    assert (result.returncode, "unknown card" in result.stderr) == (1, True)


def test_a_utilization_outside_the_sized_interval_is_an_error(tmp_path: Path) -> None:
    run, model = tmp_path / "run.yaml", tmp_path / "model"
    model.mkdir()
    config = json.loads((PARTS / "model" / "config.json").read_text("utf-8"))
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (model / "config.json").write_text(json.dumps(config | wide | heads), "utf-8")
    text = VALID_RUN_FILE.replace(f"{PARTS}/model", "./model").replace(
        "max_seq", "gpu_memory_utilization: 0.98, fast_inference: true, max_seq"
    )
    run.write_text(text, "utf-8")
    assert envcheck("validate", run).returncode == 0
    result = envcheck("validate", run, "--gpu", "h100")
    assert (result.returncode, "error[LOAD008]" in result.stdout) == (1, True), result
    run.write_text(text.replace("0.98", "0.5"), "utf-8")
    assert envcheck("validate", run, "--gpu", "h100").returncode == 0


def test_validate_imports_no_heavy_library(tmp_path: Path) -> None:
    """jsonschema is not imported either, because its import can take a second."""
    run = tmp_path / "run.yaml"
    run.write_text(VALID_RUN_FILE + "lora: {r: 0}\n", "utf-8")
    script = (
        "import sys\n"
        f"sys.argv = ['envcheck', 'validate', {str(run)!r}]\n"
        "from toolkit.cli.envcheck import main\n"
        "try:\n    main()\n"
        "finally:\n    print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "yaml" in loaded
    assert not loaded & {
        "torch", "transformers", "vllm", "trl", "peft", "datasets", "numpy", "pyarrow", "pynvml",
        "jsonschema", "referencing", "requests", "urllib3",
    }  # fmt: skip


def test_an_override_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID_RUN_FILE)
    command = [f"{sys.exec_prefix}/bin/envcheck", "validate", "run.yaml", "--set"]
    result = subprocess.run(
        [*command, b"grpo.run_name=\xff"], cwd=tmp_path, capture_output=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert b"error[DOC012] an override must be UTF-8 text" in result.stdout
    assert result.stderr == b""
