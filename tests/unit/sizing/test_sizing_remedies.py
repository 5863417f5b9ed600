"""For at least 60 runs that do not fit: with the first remedy the run fits, and the validator
accepts it for the card.
"""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.capability import FLOAT8_NATIVE, FOUR_BIT
from toolkit.config.document_loader import load_document
from toolkit.config.validate import validate
from toolkit.gpu import cards
from toolkit.sizing import Device, solve
from toolkit.sizing.device import device_situation

if TYPE_CHECKING:
    from pathlib import Path

MODELS = {
    "meta-llama/Llama-3.2-3B": ("2060", "3080", "3060", "t4"),
    "Qwen/Qwen2.5-7B": ("t4", "5080", "4090", "a100-40"),
    "meta-llama/Llama-3.1-8B": ("t4", "l4", "h100:1g.20gb", "a40"),
    "Qwen/Qwen2.5-32B": ("a100", "h100", "l40s", "h200"),
    "meta-llama/Llama-3.3-70B-Instruct": ("h100", "h200", "b200", "a100"),
}
QUANTIZED = {
    "Qwen/Qwen3-30B-A3B": ("4090", "h100:3g.40gb"),
    "mistralai/Mixtral-8x7B-v0.1": ("l40s", "h200:1g.18gb"),
    "Qwen/Qwen3-32B": ("3090", "rtx-pro-6000:1g.24gb"),
    "microsoft/phi-4": ("16GiB:7.5", "5060-ti"),
}
"""These models are loaded in 4 bits. The first two have experts."""
RUNS = (
    # max_seq_length, prompt, completion, rank, micro-batch
    (131072, 512, 512, 16, 1),
    (4096, 2048, 2048, 64, 8),
    (8192, 1024, 7168, 128, 16),
)


def run_file(folder: Path, model: Path, run: tuple[int, ...], **values_of_model: Any) -> Path:
    """Write a run file and its dataset. The model folder has only a config.json."""
    length, prompt, completion, rank, micro = run
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(16)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "model": {"model_name": str(model), "max_seq_length": length, **values_of_model},
        "lora": {"r": rank, "lora_alpha": rank},
        "dataset": {"path": "train.jsonl", "prompt": "question", "answer": "answer"},
        "reward": {"functions": [{"name": "numeric_match"}]},
        "runtime": {"engine": "vllm"},
        "grpo": {
            "max_prompt_length": prompt,
            "max_completion_length": completion,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": max(1, 16 // micro),
            "num_generations": 8,
        },
    }
    path = folder / "run.json"
    path.write_text(json.dumps(values))
    return path


def validated_config(path: Path, overrides: list[str], device: Device) -> Any:
    """The validated config of a run file with these overrides on this card. If a rule refuses the
    run, the assertion shows the messages.
    """
    validation = validate(load_document(path, overrides), device_situation(device))
    errors = [
        str(finding.message) for finding in validation.findings if str(finding.severity) == "error"
    ]
    assert validation.config is not None, errors
    return validation.config


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, all_shapes: Any, spec_of: Any) -> list[Any]:
    """Every combination of model, card and run that does not fit, with the sizer's result."""
    infeasible = []
    for name, names in [*MODELS.items(), *QUANTIZED.items()]:
        folder = tmp_path_factory.mktemp("model")
        shape = all_shapes[name]["config"]
        (folder / "config.json").write_text(json.dumps(shape))
        longest = shape["max_position_embeddings"]
        for number, (card, run) in enumerate(product(names, RUNS)):
            run_folder = folder / f"run-{number}"
            run_folder.mkdir()
            fits = (min(run[0], longest), *run[1:])
            four_bit = {"load_in_4bit": True} if name in QUANTIZED else {}
            path = run_file(run_folder, folder, fits, **four_bit)
            device = Device.from_card(cards.find_card(card))
            result = solve(validated_config(path, [], device), spec_of(name), device)
            if not result.feasible:
                infeasible.append((name, card, path, device, result))
    return infeasible


def test_the_first_remedy_of_60_runs_is_enough_and_accepted(
    refused: list[Any], spec_of: Any
) -> None:
    assert len(refused) >= 60
    for name, card, path, device, result in refused:
        first = result.remedies[0]
        assert first.enough, (name, card, [str(one) for one in result.remedies])
        target_device = Device.from_card(cards.find_card(first.card)) if first.card else device
        overrides = [f"{key}={json.dumps(value)}" for key, value in first.settings]
        config = validated_config(path, overrides, target_device)
        after = solve(config, spec_of(name), target_device, world_size=first.world_size or 1)
        assert after.feasible, (name, card, str(first))


def test_remedies_are_ordered_by_harm_and_then_by_bytes(refused: list[Any]) -> None:
    for *_, result in refused:
        order = [(not one.enough, one.harm, -one.frees_bytes) for one in result.remedies]
        assert order == sorted(order)
        assert all(one.frees_bytes > 0 and one.costs for one in result.remedies)


def test_no_remedy_needs_a_feature_that_the_card_lacks(refused: list[Any]) -> None:
    for _, card, _, device, result in refused:
        keys = {key for one in result.remedies for key, _ in one.settings}
        if device.compute_capability < FLOAT8_NATIVE:
            assert "model.float8_kv_cache" not in keys, card
        assert device.compute_capability >= FOUR_BIT or "model.load_in_4bit" not in keys


def test_a_context_that_is_too_long_is_shortened_first(spec_of: Any, card: Any, run: Any) -> None:
    """max_seq_length is 131,072, and prompts and completions have 512 tokens each. 1024 tokens are
    enough, so the first remedy has no disadvantage.
    """
    config = run(max_seq_length=131072)
    result = solve(config, spec_of("meta-llama/Llama-3.2-3B"), card("3060"))
    first = result.remedies[0]
    assert not result.feasible
    assert first.change == "max_seq_length 131072 -> 1024"
    assert dict(first.settings) == {"model.max_seq_length": 1024}
    assert (first.enough, first.harm, first.costs) == (True, 0, "loses nothing")


def test_remedies_with_more_cards_say_so(refused: list[Any]) -> None:
    larger_cards = [one for *_, result in refused for one in result.remedies if one.card]
    assert larger_cards
    assert all(one.enough and "a larger card:" in one.change for one in larger_cards)
    more_cards = [one for *_, result in refused for one in result.remedies if one.world_size]
    assert all("a second card" in one.change or "cards (--" in one.change for one in more_cards)
    assert any("tensor_parallel_size" in one.change and one.enough for one in more_cards)
