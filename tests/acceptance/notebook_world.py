"""A small model and the parts that GRPO notebooks share: loading, data, reward functions, and the
usual arguments of the trainer.

Only this module replaces the notebooks' settings that need a GPU (4-bit loading, the engine, 8-bit
optimizers) and the settings that would take hours (steps, lengths).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))

SYSTEM = "think, then answer."
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL_MODEL = {"load_in_4bit": False, "fast_inference": False, "max_seq_length": 96}
SHORT_RUN = {
    "max_steps": 2,
    "max_prompt_length": 60,
    "max_completion_length": 8,
    "use_cpu": True,
    "optim": "adamw_torch",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_folder(folder: Path) -> Path:
    from tiny_llama import make_tiny

    return make_tiny(folder, max_position_embeddings=256, chat=True)


def questions(count: int = 12) -> Dataset:
    """Rows in the format of gsm8k: the result in ``answer`` follows four hashes."""
    rows = [
        {"question": f"{a}+{a + 1}=?", "answer": f"add them. #### {2 * a + 1}"}
        for a in range(count)
    ]
    return Dataset.from_list(rows)


def hash_answer(text: str) -> str | None:
    return text.split("####")[1].strip() if "####" in text else None


def chats(count: int = 12) -> Dataset:
    """The rows as gsm8k notebooks map them: a prompt of two chat messages, and the result."""
    return questions(count).map(
        lambda row: {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["question"]},
            ],
            "answer": hash_answer(row["answer"]),
        }
    )


def tag_content(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def correct(prompts: Any, completions: Any, answer: list[str], **kwargs: Any) -> list[float]:
    given = [tag_content(completion[0]["content"]) for completion in completions]
    return [2.0 if one == right else 0.0 for one, right in zip(given, answer, strict=True)]


def is_number(completions: Any, **kwargs: Any) -> list[float]:
    return [0.5 if tag_content(c[0]["content"]).isdigit() else 0.0 for c in completions]


def strict_format(completions: Any, **kwargs: Any) -> list[float]:
    pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    return [0.5 if re.match(pattern, c[0]["content"]) else 0.0 for c in completions]


def counted_tags(completions: Any, **kwargs: Any) -> list[float]:
    marks = ("<", ">", "/", "1", "2")
    return [sum(0.125 for m in marks if m in c[0]["content"]) for c in completions]


def varies(completions: Any, **kwargs: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, text)) % 97 / 97 for text in texts]


def trained_layers(model: Any) -> set[str]:
    """Names of the LoRA B matrices that are not zero. They are zero before the training."""
    return {n for n, p in model.named_parameters() if "lora_B" in n and bool(p.detach().any())}
