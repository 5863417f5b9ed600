"""The whole benchmark: checkpoint, floor, arms, figures."""

from __future__ import annotations

import json
import multiprocessing
from typing import TYPE_CHECKING, Any

from toolkit.train.bench import compare
from toolkit.train.bench.floor import Card, Work, floor_seconds, measure_card
from toolkit.train.bench.shapes import SHAPES, make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from toolkit.train.bench.settings import Settings


def bench(
    shape: str,
    settings: Settings,
    arms: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    *,
    limit_s: float,
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Returns the report (also at ``folder/bench.json``, after each arm) and the table's rows.

    The checkpoint is made, and the card measured, in processes of their own: this one must hold no
    device memory while the arms run.
    """
    say(f"making a random {shape} checkpoint in {settings.model}")
    card = _apart(_prepare, shape, settings.model)
    floor = floor_seconds(_work(shape, settings), card)
    report, results = {}, []
    for results in compare.compare(settings, arms, folder, say, limit_s=limit_s):
        report = compare.report(settings, results, floor, card.name)
        (folder / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    return report, compare.table(results, floor)


def _prepare(shape: str, model: str) -> Card:
    from pathlib import Path  # noqa: PLC0415 - runs in the other process

    make_checkpoint(shape, Path(model))
    return measure_card()


def _apart(function: Callable[..., Card], *arguments: str) -> Card:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _work(shape: str, settings: Settings) -> Work:
    """The shape's sizes: bf16 weights and cache, as on a GPU (float32 on a CPU is its double)."""
    config = SHAPES[shape].config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * hidden * query + 2 * hidden * key_value + 3 * hidden * inner
    heads = 1 if config["tie_word_embeddings"] else 2
    parameters = config["num_hidden_layers"] * layer + heads * config["vocab_size"] * hidden
    return Work(
        parameters=parameters,
        weight_bytes=2 * parameters,
        kv_bytes_per_token=2 * 2 * config["num_hidden_layers"] * key_value,
        prompts=settings.prompts,
        sequences=settings.sequences,
        prompt_tokens=settings.prompt_tokens,
        completion_tokens=settings.completion_tokens,
    )
