"""Tools of a run file on the real engine: several turns, and a mask over the results of the
tools.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "acceptance"))

from test_tools_train import world

from toolkit.config.build_config import build_config
from toolkit.config.document_loader import assemble
from toolkit.config.source import Source
from toolkit.train.run import run
from toolkit.train.run_context import Options
from toolkit.train.trainer import GRPOTrainer

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOLERANCE = 2e-2


def test_a_run_file_with_tools_on_the_engine(tmp_path: Path, monkeypatch: Any) -> None:
    """Each completion has two calls. The training pass masks exactly the tokens that were not
    sampled, and its log-probabilities of the sampled tokens agree with the engine's.
    """
    turns = {"max_tool_calling_iterations": 2, "max_completion_length": 40, "max_steps": 2}
    token_limit = {"generation_kwargs": {"max_tokens": 6}}
    folder = world(tmp_path, grpo={**turns, **token_limit})["folder"]
    values = json.loads((folder / "run.yaml").read_text())
    values["model"] |= {"gpu_memory_utilization": 0.9, "max_num_seqs": 8}
    values["runtime"] |= {"engine": "vllm"}
    source = Source("run.json", json.dumps(values), folder, folder / "run.json", "json")
    config = build_config(assemble(source))

    masks: list[tuple[Any, Any, Any]] = []
    compute_loss = GRPOTrainer._compute_loss

    def record_masks(self: Any, model: Any, inputs: Any) -> Any:
        if model.training:
            masks.append((inputs["completion_ids"], inputs["completion_mask"], inputs["tool_mask"]))
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", record_masks)
    monkeypatch.chdir(folder)
    out = run(config, Options(out=io.StringIO()))

    def read_rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (out / name).read_text().splitlines()]

    calls = read_rows("tool_calls.jsonl")
    assert [(row["step"], row["completion"], row["turn"]) for row in calls] == [
        (step, completion, turn) for step in (1, 2) for completion in range(4) for turn in (1, 2)
    ]
    assert all(row["result"] == str(len(row["arguments"]["text"])) for row in calls)
    metrics = [row for row in read_rows("metrics.jsonl") if "tools/call_frequency" in row]
    assert [row["tools/call_frequency"] for row in metrics] == [2, 2]
    assert all(row["sampling/logp_gap_max"] < TOLERANCE for row in metrics)

    from tiny_llama import make_tokenizer

    tokenizer = make_tokenizer()
    results = []
    for ids_BC, mask_BC, tool_BC in masks:
        for ids, mask, own_tokens in zip(ids_BC, mask_BC, tool_BC, strict=True):
            left_out = ids[(mask == 1) & (own_tokens == 0)]
            results.append(re.findall(r"<t>(\d+)", tokenizer.decode(left_out)))
    expected = [
        [row["result"] for row in calls if (row["step"], row["completion"]) == (step, completion)]
        for step in (1, 2)
        for completion in range(4)
    ]
    # TRL shuffles the rows of a batch before training.
    assert sorted(results) == sorted(expected)
