"""Plain vLLM accepts the command that ``toolkit export`` prints, and with the exported adapter it
gives the same tokens as the policy of the run.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "acceptance"))

import train_world

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the toolkit does not filter vLLM's warnings here
]
PROMPTS = ["10+11=", "12+13=", "13+15=", "11+10="]
MAX_TOKENS = 6


def served_arguments(line: str) -> Any:
    """The arguments of the printed command, as vLLM's own parser reads them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])


def test_plain_vllm_serves_the_exported_adapter(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    world = train_world.make_run_files(tmp_path, steps=4)
    train = ("train", world, "--no-evaluate", "--set", "grpo.learning_rate=0.05")
    trained = train_world.run_toolkit(*train)
    assert trained.returncode == 0, trained.stderr
    exported = train_world.run_toolkit("export", tmp_path / "run", "--to", tmp_path / "sums")
    assert exported.returncode == 0, exported.stderr
    line = exported.stdout.splitlines()[-1].removeprefix("serve it: ")

    greedy_options = ("--max-tokens", MAX_TOKENS, "--temperature", 0, "--json")
    generated = train_world.run_toolkit("generate", tmp_path / "run", *PROMPTS, *greedy_options)
    assert generated.returncode == 0, generated.stderr

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from toolkit.engine.start import free_previous_engine

    serve_arguments = served_arguments(line)
    lora = serve_arguments.lora_modules[0]
    assert (lora.name, lora.path) == ("sums", str(tmp_path / "sums"))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # An engine of an earlier test in this process would destroy vLLM's process groups when the
    # garbage collector frees it.
    free_previous_engine()
    llm = LLM(
        model=serve_arguments.model_tag,
        max_model_len=serve_arguments.max_model_len,
        dtype=serve_arguments.dtype,
        enable_lora=serve_arguments.enable_lora,
        max_lora_rank=serve_arguments.max_lora_rank,
        enforce_eager=True,
        block_size=32,
        max_num_seqs=8,
    )
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    request = LoRARequest(lora.name, 1, lora.path)
    with_adapter = [o.outputs[0].text for o in llm.generate(PROMPTS, greedy, lora_request=request)]
    base = [o.outputs[0].text for o in llm.generate(PROMPTS, greedy)]
    assert with_adapter != base
    rows = [json.loads(row) for row in generated.stdout.splitlines()]
    assert with_adapter == [row["completions"][0] for row in rows]
