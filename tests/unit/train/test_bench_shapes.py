"""Prompts of the benchmark have the requested number of tokens. The reward reads the numbers in
the words of a completion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.train.bench.arm_settings import Settings
from toolkit.train.bench.arms import prompts, reward_odd
from toolkit.train.bench.shapes import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_each_word_is_one_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_checkpoint("tiny", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = prompts(Settings(model=str(folder), prompt_tokens=48))[:50]
    assert {len(tokenizer(row["prompt"]).input_ids) for row in rows} == {48}
    completion = tokenizer.decode([1, 3, 7, 2, 8, 9, 0], skip_special_tokens=True)
    assert completion.split() == ["t7", "t8", "t9"]
    assert reward_odd([completion]) == [2 / 3]
