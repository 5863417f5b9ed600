"""TRL's GRPOConfig from a run file: one half precision, and what the run file says is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from datasets import Dataset
from trainer_helpers import ROWS, make_policy, ones
from trainer_helpers import arguments as trl_arguments

from toolkit.base.errors import MissingExtraError
from toolkit.config import load_run
from toolkit.config.resolved import resolve_run
from toolkit.policy.gradient_checkpointing import apply_checkpointing
from toolkit.policy.machine_facts import detect_machine
from toolkit.train.demo import make_tokenizer
from toolkit.train.trainer import GRPOTrainer
from toolkit.train.trl_arguments import grpo_config, require_packages

if TYPE_CHECKING:
    from pathlib import Path

RUN_FILE = """\
model: {{model_name: m, max_seq_length: 64{model}}}
dataset: {{path: train.jsonl, prompt: q, answer: a}}
reward: {{functions: [{{name: exact_match}}]}}
grpo: {{max_steps: 1, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 8{grpo}}}
runtime: {{engine: transformers}}
"""  # noqa: E501


def arguments(tmp_path: Path, *, model: str = "", grpo: str = "", gpu: bool = False):
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "train.jsonl").write_text('{"q": "1", "a": "1"}\n')
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(model=model, grpo=grpo))
    config = load_run(str(tmp_path / "run.yaml"))
    config = resolve_run(config, detect_machine()).config if gpu else config
    made = grpo_config(config, tmp_path, SimpleNamespace, has_eval=False)
    return made, config


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """A GPU of a compute capability, as far as the arguments ask."""

    def set_to(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))

    return set_to


@pytest.mark.parametrize(
    ("major", "model", "grpo", "bf16", "fp16", "dtype"),
    [
        (9, "", "", True, False, "bfloat16"),
        (7, "", "", False, True, "float16"),
        (9, "", ", fp16: true", False, True, "float16"),
        (9, "", ", bf16: true", True, False, "bfloat16"),
        (9, ", dtype: float16", "", False, True, "float16"),
        (9, ", dtype: float32", "", False, False, "float32"),
        (9, ", dtype: float32", ", fp16: true", False, True, "float32"),
    ],
)
def test_one_half_precision_and_the_engines(tmp_path, card, major, model, grpo, bf16, fp16, dtype):
    card(major)
    made, config = arguments(tmp_path, model=model, grpo=grpo, gpu=True)
    assert (made.bf16, made.fp16) == (bf16, fp16)
    assert config.model.dtype == dtype


def test_float32_on_a_cpu(tmp_path):
    made, _ = arguments(tmp_path)
    assert (made.bf16, made.fp16, made.use_cpu) == (False, False, True)


def test_ranks_do_not_look_for_unused_parameters_unless_told_to(tmp_path):
    assert arguments(tmp_path)[0].ddp_find_unused_parameters is False
    told, _ = arguments(tmp_path, grpo=", ddp_find_unused_parameters: true")
    assert told.ddp_find_unused_parameters is True


def test_completions_are_ours_unless_they_are_to_be_uploaded(tmp_path):
    made, _ = arguments(tmp_path, grpo=", log_completions: true")
    assert made.log_completions is False
    upload = ", log_completions: true, log_completions_hub_repo: me/x"
    made, _ = arguments(tmp_path, grpo=upload)
    assert made.log_completions is True
    assert made.num_completions_to_print == 0
    assert made.log_completions_hub_repo == "me/x"


def test_a_whole_number_for_a_float_and_no_tracker_are_what_upstream_takes(tmp_path):
    made, _ = arguments(tmp_path, grpo=", adam_beta1: 0, save_steps: 5, report_to: null")
    assert (made.adam_beta1, type(made.adam_beta1)) == (0.0, float)
    assert type(made.save_steps) is int
    assert made.report_to == []


@pytest.mark.parametrize(
    ("grpo", "words"),
    [
        (", report_to: [kubeflow, dvclive]", "grpo.report_to: dvclive needs dvclive"),
        (", optim: adamw_anyprecision", "grpo.optim: adamw_anyprecision needs torchdistx"),
        (", use_liger_kernel: true", "grpo.use_liger_kernel: true needs liger-kernel"),
        (", cache_implementation: quantized", "quantized needs optimum-quanto"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_loaded(tmp_path, grpo, words):
    _, config = arguments(tmp_path, grpo=grpo)
    with pytest.raises(MissingExtraError) as refused:
        require_packages(config)
    assert words in str(refused.value)
    assert "fix: pip install " in str(refused.value)
    require_packages(arguments(tmp_path, grpo=", report_to: kubeflow, optim: sgd")[1])


@pytest.mark.parametrize("asked", [False, True, None])
@pytest.mark.parametrize("written", [True, False])
def test_checkpointing_is_what_the_model_was_given(tmp_path, asked, written):
    """None is a model that did not come from FastLanguageModel: there TRL's argument rules."""
    policy = make_policy()
    if asked is not None:
        apply_checkpointing(policy, asked, max_seq_length=None)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=ones,
        args=trl_arguments(tmp_path, max_steps=1, gradient_checkpointing=written),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert trainer.model.get_base_model().is_gradient_checkpointing is (
        written if asked is None else asked
    )
