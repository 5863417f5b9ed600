"""Rollouts of several turns in TRL's loop: steps of an environment, calls of tools, the mask of the
training pass, and the log of each call.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from toolkit.base.errors import ConfigError
from toolkit.policy.lora import add_lora
from toolkit.policy.lora_settings import LoraSettings
from toolkit.train.report.metrics_log import LOG_FILES, TOOL_LOG_FILES, Journal
from toolkit.train.rewards.error_policy import ErrorPolicy, guard
from toolkit.train.rewards.openenv import OpenEnv
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed
from toolkit.train.rollout.tool_log import ToolLog
from toolkit.train.rollout.tools import Episode, StopRun, Tool
from toolkit.train.trainer import GRPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[2] / "fixtures"))
from tiny_llama import make_tiny, make_tokenizer
from trainer_helpers import arguments

CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}({{ c['function']['name'] }}"
    "{% for k, v in c['function']['arguments'].items() %} {{ k }} {{ v }}{% endfor %})"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def calls_of(name: str) -> dict[str, Any]:
    """A response template that parses each text as a call of ``name`` with this text."""
    call = {"name": name, "arguments": {"text": "{said}"}}
    said = {"open_pattern": "(?P<said>.+)", "repeats": True, "content": "text"}
    fields = {
        "tool_calls": {**said, "transform": {"type": "function", "function": call}},
        "content": {"content": "text"},
    }
    return {"defaults": {"role": "assistant"}, "start_anchor": "<a>", "fields": fields}


def schema(name: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
    }
    function = {"name": name, "description": "Say a text.", "parameters": parameters}
    return {"type": "function", "function": function}


class Host:
    """Replaces the worker process. An answer names the step. An episode with seed 1 fails."""

    schema = schema("step")

    def __init__(self) -> None:
        self.slots = 0

    def __call__(self) -> Episode:
        self.slots += 1
        return Episode(self, self.slots)  # type: ignore[arg-type]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["arguments"] is None:
            return {"text": "go", "reward": 0.0, "done": False}
        if request["seed"] == 1:
            raise UserCodeFailed(Failure("broke"))
        steps = len(request["past"]) + 1
        return {"text": f"step{steps}", "reward": steps * 0.25, "done": steps == 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


def trainer_of(
    checkpoint: Path, folder: Path, called: str, rewards: Any, rows: Any, **more: Any
) -> GRPOTrainer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = CHAT, calls_of(called)
    model = add_lora(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        LoraSettings(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), random_state=5),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*environment_factory")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=arguments(
                folder, max_steps=1, max_completion_length=80, max_tool_calling_iterations=2,
                generation_kwargs={"max_new_tokens": 6},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **more,
        )  # fmt: skip
    trainer.tool_log = ToolLog()
    return trainer


def test_the_model_acts_in_an_environment(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "go"}], "problem": json.dumps({"seed": seed})}
        for seed in (0, 1)
    ]
    bad = tmp_path / "bad.jsonl"
    reward = guard("openenv", OpenEnv(task="game:Game"), ErrorPolicy("none", None, bad))
    trainer = trainer_of(checkpoint, tmp_path, "step", reward, rows, environment_factory=Host())
    masked: list[tuple[Any, ...]] = []
    compute = GRPOTrainer._compute_loss

    def record_masks(self: Any, model: Any, inputs: Any) -> Any:
        masked.append((inputs["completion_ids"], inputs["completion_mask"], inputs["tool_mask"]))
        return compute(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", record_masks)
    trainer.train()

    journal = Journal(tmp_path, names=(*LOG_FILES, *TOOL_LOG_FILES))
    trainer.tool_log.write(journal, 1)
    journal.close()
    calls = [json.loads(line) for line in (tmp_path / TOOL_LOG_FILES[0]).read_text().splitlines()]
    results: dict[int, list[str]] = {}
    for call in calls:
        assert (call["tool"], call["step"]) == ("step", 1)
        results.setdefault(call["completion"], []).append(call["result"])
    sound = ["step1", "step2\n(the episode has ended)"]
    broken = ["the environment broke"] * 2
    assert sorted(map(str, results.values())) == sorted([str(sound)] * 4 + [str(broken)] * 4)
    assert [call["turn"] for call in calls] == [1, 2] * 8
    # The episodes that failed have no score, and are saved.
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["rewards/openenv/mean"] == pytest.approx(0.75)
    assert row["rewards/openenv/failed"] == 0.5
    assert '"problem": "broke"' in bad.read_text()
    # Training masks the text of the environment and the header of the model's next message.
    tokenizer, masked_texts = make_tokenizer(), []
    for ids_BC, mask_BC, own_BC in masked:
        for ids, mask, own in zip(ids_BC, mask_BC, own_BC, strict=True):
            masked_texts.append(tokenizer.decode(ids[(mask == 1) & (own == 0)]))
    # The second answer of a failed episode does not fit into the completion, so TRL drops it.
    counts = sorted((text.count("<t>"), text.count("<a>")) for text in masked_texts)
    assert counts == [(1, 1)] * 4 + [(2, 2)] * 4
    assert sum("step1" in text and "step2" in text for text in masked_texts) == 4


def test_a_tool_can_end_the_run(checkpoint: Path, tmp_path: Path) -> None:
    """TRL sends each Exception of a tool to the model. StopRun, a BaseException, ends the run."""

    def fail(arguments: Any, position: Any) -> str:
        raise StopRun(ConfigError("tool search took longer than 1 s", where="tools.functions"))

    trainer = trainer_of(
        checkpoint,
        tmp_path,
        "search",
        lambda completions, **_: [0.0] * len(completions),
        [{"prompt": [{"role": "user", "content": "go"}]}] * 2,
        tools=[Tool(schema("search"), fail)],
    )
    with pytest.raises(ConfigError, match="tool search took longer than 1 s"):
        trainer.train()
