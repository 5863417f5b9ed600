"""Write run folders with the files of a real run. The numbers are made up, but they change over
the steps like those of a real run.
"""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = (
    "</pre></main><script>document.title='owned'</script>"
    "<img src=https://evil.example/x onerror=alert(1)></style><svg onload=alert(1)>"
    '<a href="javascript:alert(1)">x</a>\' onmouseover=\'alert(1)" autofocus onfocus="alert(1)'
    "<!-- --!> ]]> {{7*7}} \x1b[31mred\u202eevil\u202c\x00 &lt;b&gt;"
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(step: int, steps: int, dice: random.Random) -> dict[str, Any]:
    done = step / steps
    level = 0.12 + 0.8 / (1 + math.exp(-9 * (done - 0.35)))
    reward = min(1.2, max(0.0, level + dice.gauss(0, 0.05)))
    length = 96 + 90 * done - 60 * done**2 + dice.gauss(0, 6)
    spike = 4.0 if step == int(steps * 0.7) else 0.0
    return {
        "step": step,
        "reward": reward,
        "reward_std": 0.1 + 0.35 * (1 - abs(2 * done - 0.9)) * 0.7,
        "loss": dice.gauss(0, 0.02),
        "kl": 0.0004 + 0.09 * done**1.5 + abs(dice.gauss(0, 0.006)) + spike,
        "entropy": 1.4 * math.exp(-1.8 * done) + abs(dice.gauss(0, 0.03)),
        "completion_length": length,
        "completions/min_length": length * 0.45,
        "completions/max_length": min(256.0, length * 1.8),
        "completions/clipped_ratio": max(0.0, dice.gauss(0.05, 0.03)),
        "frac_reward_zero_std": min(1.0, max(0.0, 0.1 + 0.6 * done**2 + dice.gauss(0, 0.06))),
        "grad_norm": 0.4 + abs(dice.gauss(0, 0.15)),
        "learning_rate": 5e-6 * min(1.0, step / (steps * 0.1)) * (1.05 - done),
        "sampling/logp_gap_mean": 0.012 + abs(dice.gauss(0, 0.003)),
        "sampling/logp_gap_max": 0.06 + abs(dice.gauss(0, 0.02)),
        "rewards/numeric_match/mean": reward * 0.85,
        "rewards/format/mean": min(1.0, 0.3 + 1.4 * done) if done < 0.5 else 1.0,
        "rewards/length_penalty/mean": -max(0.0, 0.1 - 0.1 * done + dice.gauss(0, 0.01)),
    }


def timings(step: int, dice: random.Random) -> dict[str, Any]:
    rollout, train = 1.4 + abs(dice.gauss(0, 0.2)), 1.1 + abs(dice.gauss(0, 0.05))
    step_s = rollout + train + 0.08
    return {
        "step": step,
        "time_s": step * 2.75,
        "step_s": step_s,
        "rollout_s": rollout,
        "train_s": train,
        "publish_s": 0.03,
        "reward_s": 0.05,
        "tokens_per_s": 64 * 110 / step_s,
        "peak_memory_bytes": int((41 + step / 200) * 2**30),
    }


def completions(step: int, steps: int, dice: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(2):
        left, right = dice.randint(12, 99), dice.randint(12, 99)
        prompt = [
            {"role": "system", "content": "Think in <think> tags, answer in <answer> tags."},
            {"role": "user", "content": f"Ann has {left} apples and buys {right} more. How many?"},
        ]
        for _ in range(6):
            right_one = dice.random() < 0.2 + 0.75 * step / steps
            total = left + right if right_one else left + right + dice.choice([-10, -1, 1, 10])
            text = f"<think>{left} + {right} = {total}</think>\n<answer>{total}</answer>"
            rows.append(
                {
                    "step": step,
                    "prompt": prompt,
                    "completion": [{"role": "assistant", "content": text}],
                    "reward": 1.2 if right_one else 0.2,
                    "rewards": {"numeric_match": float(right_one), "format": 1.0},
                    "advantage": 0.7 if right_one else -1.1,
                }
            )
    return rows


CONFIG: dict[str, Any] = {
    "model": {"model_name": "meta-llama/Llama-3.2-1B-Instruct", "max_seq_length": 1024},
    "lora": {"r": 64, "lora_alpha": 64, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "dataset": {"path": "gsm8k/train.jsonl", "prompt": "question", "answer": "answer"},
    "reward": {
        "functions": [
            {"name": "numeric_match", "weight": 1.0, "options": {}},
            {"name": "format", "weight": 0.2, "options": {"tags": ["think", "answer"]}},
        ],
        "on_error": "fail",
    },
    "grpo": {
        "max_steps": 300, "num_generations": 8, "learning_rate": 5e-6, "beta": 0.001,
        "loss_type": "dapo", "max_completion_length": 256,
    },
    "runtime": {"engine": "vllm", "output_dir": "runs/gsm8k", "allow_code": []},
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "toolkit": "0.1.0",
    "written": "2026-11-24T05:00:00+00:00",
    "python": "3.11.9",
    "packages": {"torch": "2.11.0", "transformers": "5.17.0", "trl": "1.16.0", "vllm": "0.25.1"},
    "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "modified": False},
    "driver": "580.159.04",
    "gpus": [{"name": "NVIDIA H200", "uuid": "GPU-0"}],
    "data_sha256": {"train": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
    "seeds": {"grpo.seed": 42, "lora.random_state": 3407},
}
_TERMS = {
    "engine: KV cache": 24.0, "engine: weights (shared)": 2.3, "training: activations": 6.1,
    "training: logits": 3.9, "LoRA tables": 0.6, "optimizer": 0.4, "CUDA context": 0.5,
    "CUDA graphs": 1.1, "margin": 1.4,
}  # fmt: skip
PREFLIGHT: dict[str, Any] = {
    "device": "NVIDIA H200",
    "checks": [
        {"id": "persistence", "verdict": "warn", "evidence": "persistence mode is off"},
        {"id": "ecc", "verdict": "pass", "evidence": "no errors"},
    ],
    "sizing": {
        "budget": [
            {"term": term, "bytes": int(gib * 2**30), "source": "priced from config.json"}
            for term, gib in _TERMS.items()
        ]
    },
}
EVALUATION: dict[str, Any] = {
    part: {
        "count": 500,
        "reward": value * 1.1,
        "rewards": {"numeric_match": value, "format": 0.4 + value * 0.6},
        "completion_length": length,
    }
    for part, value, length in (("before", 0.31, 101.0), ("after", 0.74, 131.5))
}


def make_run(folder: Path, steps: int = 300, *, finished: bool = True) -> Path:
    """Write the run folder of a run of ``steps`` steps, and return it."""
    dice = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in range(1, steps + 1):
        rows.append(metrics(step, steps, dice))
        if step % 50 == 0:
            rows.append({"step": step, "eval/reward": rows[-1]["reward"] - 0.05})
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "timings.jsonl", [timings(step, dice) for step in range(1, steps + 1)])
    samples = [row for step in range(1, steps + 1) for row in completions(step, steps, dice)]
    write_rows(folder / "completions.jsonl", samples)
    documents = {"config": CONFIG, "manifest": MANIFEST, "preflight": PREFLIGHT}
    if finished:
        documents["evaluation"] = EVALUATION
        (folder / "adapter").mkdir(exist_ok=True)
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
