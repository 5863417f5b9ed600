"""The option --fix: the keys that it changes, the edits that it reports, and the findings that the
user must fix.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.config.document_loader import assemble
from toolkit.config.fix import Repair, fix_source
from toolkit.config.key_moves import key_schema
from toolkit.config.migration import CONVERSIONS, MOVED_KEYS
from toolkit.config.rules import Situation
from toolkit.config.source import Source
from toolkit.config.validate import validate

PARTS = Path(__file__).parents[2] / "fixtures" / "parts"
HEAD = f"""\
model:
  model_name: {PARTS}/model
  max_seq_length: 1024
dataset: {{path: {PARTS}/train.jsonl, prompt: question}}
reward: {{functions: [{{name: numeric_match}}]}}
"""
GRPO = "grpo:\n  learning_rate: 0.001\n"


def repair(text: str, form: str = "yaml") -> Repair:
    return fix_source(Source("run", text, Path.cwd(), None, form), (), Situation())


def rules(text: str, form: str = "yaml") -> list[str]:
    source = Source("run", text, Path.cwd(), None, form)
    return [finding.rule for finding in validate(assemble(source, ()), Situation()).findings]


@pytest.mark.parametrize(
    ("old", "expected_text", "expected_edit"),
    [
        ("use_vllm: true", GRPO + "runtime:\n  engine: vllm\n",
         "grpo.use_vllm: true -> runtime.engine: vllm"),
        ("use_vllm: false", GRPO + "runtime:\n  engine: transformers\n",
         "grpo.use_vllm: false -> runtime.engine: transformers"),
        ("vllm_mode: colocate", GRPO, "grpo.vllm_mode: colocate -> (removed)"),
        ("gradient_checkpointing: true # less memory",
         GRPO + "lora:\n  use_gradient_checkpointing: true # less memory\n",
         "grpo.gradient_checkpointing: true -> lora.use_gradient_checkpointing: true"),
        ("warmup_ratio: 0.1", GRPO + "  warmup_steps: 0.1\n",
         "grpo.warmup_ratio: 0.1 -> grpo.warmup_steps: 0.1"),
        ("group_by_length: true", GRPO, "grpo.group_by_length: true -> (removed)"),
        ("save_safetensors: true", GRPO, "grpo.save_safetensors: true -> (removed)"),
        ("max_new_tokens: 64", GRPO + "  max_completion_length: 64\n",
         "grpo.max_new_tokens: 64 -> grpo.max_completion_length: 64"),
        ("num_generation: 8", GRPO + "  num_generations: 8\n", "num_generation -> num_generations"),
    ],
)  # fmt: skip
def test_an_old_key_is_replaced_with_the_same_meaning(
    old: str, expected_text: str, expected_edit: str
) -> None:
    result = repair(HEAD + GRPO + f"  {old}\n")
    assert result.source.text == HEAD + expected_text
    assert [f"{edit.old} -> {edit.new}" for edit in result.applied] == [expected_edit]
    assert {edit.line for edit in result.applied} == {8}
    assert rules(result.source.text) == []


def test_a_key_moves_into_an_existing_section() -> None:
    text = HEAD + GRPO + "  vllm_gpu_memory_utilization: 0.3\n"
    result = repair(text)
    assert result.source.text == HEAD.replace(
        "model:\n", "model:\n  gpu_memory_utilization: 0.3\n"
    ) + GRPO  # fmt: skip


def test_a_key_in_the_wrong_section_moves() -> None:
    text = HEAD.replace("  max_seq_length", "  max_prompt_length: 64\n  max_seq_length") + GRPO
    result = repair(text)
    assert result.source.text == HEAD + GRPO.replace("grpo:\n", "grpo:\n  max_prompt_length: 64\n")
    (edit,) = result.applied
    assert (edit.old, edit.new, edit.line) == (
        "model.max_prompt_length: 64", "grpo.max_prompt_length: 64", 3
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [
        (
            "toml",
            "[grpo]\nlearning_rate = 0.001\nuse_vllm = true\n[runtime]\nreproducible = true\n",
            '[grpo]\nlearning_rate = 0.001\n[runtime]\nengine = "vllm"\nreproducible = true\n',
        ),
        (
            "toml",
            "[grpo]\nlearning_rate = 0.001\nuse_vllm = true\n",
            '[grpo]\nlearning_rate = 0.001\n[runtime]\nengine = "vllm"\n',
        ),
        (
            "json",
            '{"grpo": {"use_vllm": true, "seed": 3}, "runtime": {"reproducible": true}}',
            '{"grpo": {"seed": 3}, "runtime": {"engine": "vllm", "reproducible": true}}',
        ),
        (
            "json",
            '{"grpo": {"seed": 3, "use_vllm": true}}',
            '{"runtime": {"engine": "vllm"}, "grpo": {"seed": 3}}',
        ),
        (
            "yaml",
            "grpo: {seed: 3, use_vllm: true}\r\nruntime: {reproducible: true}\r\n",
            "grpo: {seed: 3}\r\nruntime: {engine: vllm, reproducible: true}\r\n",
        ),
    ],
)
def test_keys_move_in_every_format(form: str, before: str, after: str) -> None:
    head = {"toml": '[model]\nmodel_name = "org/name"\n', "yaml": "model: {model_name: org/name}\n"}
    if form == "json":
        before = before[:-1] + ', "model": {"model_name": "org/name"}}'
        after = after[:-1] + ', "model": {"model_name": "org/name"}}'
    result = repair(head.get(form, "") + before, form)
    assert result.source.text == head.get(form, "") + after


@pytest.mark.parametrize(
    "line",
    [
        "loss_tipe: 3",  # 3 is not a value of loss_type
        "num_generation: many",
        "num_generation: 8\n  num_generations: 8",  # the current key is set too
        "use_vllm: maybe",
        "vllm_mode: server",  # the toolkit has no equivalent
        "vllm_gpu_memory_utilization: 30",
        "warmup_ratio: 1",  # not the same as warmup_steps: 1, which is one step
        "warmup_ratio: 1.5",
        "revision: main",  # the revision of the model, or of the dataset?
        "per_device_train_batch_size: 0",
    ],
)
def test_lines_without_a_certain_fix_stay(line: str) -> None:
    text = HEAD + GRPO + f"  {line}\n"
    assert rules(text)
    result = repair(text)
    assert (result.source.text, result.applied) == (text, ())


def test_an_old_key_is_removed_only_if_the_current_key_has_the_same_value() -> None:
    text = HEAD + GRPO + "  use_vllm: true\nruntime:\n  engine: "
    assert repair(text + "vllm\n").source.text == HEAD + GRPO + "runtime:\n  engine: vllm\n"
    assert repair(text + "transformers\n").applied == ()


def test_a_finding_with_several_fixes_is_not_fixed() -> None:
    text = HEAD + GRPO + "  num_generations: 3\n  per_device_train_batch_size: 8\n"
    result = repair(text)
    assert result.source.text == text
    assert [finding.rule for finding in result.choices] == ["GRPO001"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("epochs: 2", "num_train_epochs: 2"),
        ("max_response_length: 128", "max_completion_length: 128"),
        ("n: 4", "num_generations: 4"),
        ("n: four", None),  # not a number
        ("batch_size: 8", None),  # prompts or completions?
    ],
)
def test_a_name_from_another_tool_becomes_the_key_if_it_means_the_same(line, expected) -> None:
    text = HEAD + GRPO + f"  {line}\n"
    assert repair(text).source.text == (HEAD + GRPO + f"  {expected}\n" if expected else text)


def test_name_in_the_model_section_suggests_only_model_name() -> None:
    text = "model: {name: m}\n"
    findings = validate(assemble(Source("run", text, Path.cwd()), ()), Situation()).findings
    (unknown,) = (finding for finding in findings if finding.rule == "KEY001")
    assert [fix.text for fix in unknown.fixes] == ["did you mean model_name?"]


def test_two_equally_similar_keys_are_both_suggested() -> None:
    text = HEAD + GRPO + "  vespo_k: 2.0\n"
    validation = validate(assemble(Source("run", text, Path.cwd()), ()), Situation())
    (finding,) = (candidate for candidate in validation.findings if candidate.rule == "KEY001")
    assert {fix.text for fix in finding.fixes} == {
        "did you mean vespo_k_pos?",
        "did you mean vespo_k_neg?",
    }
    assert repair(text).source.text == text


def test_edits_have_the_lines_of_the_original_file() -> None:
    text = HEAD + GRPO + "  use_vllm: true\n  vllm_mode: colocate\nlora:\n  lora_alfa: 16\n"
    assert sorted(edit.line for edit in repair(text).applied) == [8, 9, 11]


def test_the_replacements_of_old_keys_are_in_the_schema() -> None:
    replacements = [moved.new_key for moved in MOVED_KEYS.values()] + [
        conversion.new_key for conversion in CONVERSIONS.values()
    ]
    for replacement in replacements:
        assert replacement is None or key_schema(tuple(replacement.split("."))) is not None, (
            replacement
        )
