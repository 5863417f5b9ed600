"""The GRPOConfig of a run file has one half-precision format and keeps the values of the run
file.
"""

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


def load_arguments(tmp_path: Path, *, model: str = "", grpo: str = "", gpu: bool = False):
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "train.jsonl").write_text('{"q": "1", "a": "1"}\n')
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(model=model, grpo=grpo))
    config = load_run(str(tmp_path / "run.yaml"))
    config = resolve_run(config, detect_machine()).config if gpu else config
    trl_config = grpo_config(config, tmp_path, SimpleNamespace, has_eval=False)
    return trl_config, config


@pytest.fixture
def set_compute_capability(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes PyTorch report a GPU of a given compute capability."""

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
def test_the_half_precision_format_is_that_of_the_engine(
    tmp_path, set_compute_capability, major, model, grpo, bf16, fp16, dtype
):
    set_compute_capability(major)
    made, config = load_arguments(tmp_path, model=model, grpo=grpo, gpu=True)
    assert (made.bf16, made.fp16) == (bf16, fp16)
    assert config.model.dtype == dtype


def test_float32_on_a_cpu(tmp_path):
    made, _ = load_arguments(tmp_path)
    assert (made.bf16, made.fp16, made.use_cpu) == (False, False, True)


def test_unused_parameters_are_searched_only_if_the_run_file_says_so(tmp_path):
    assert load_arguments(tmp_path)[0].ddp_find_unused_parameters is False
    config, _ = load_arguments(tmp_path, grpo=", ddp_find_unused_parameters: true")
    assert config.ddp_find_unused_parameters is True


def test_trl_logs_completions_only_to_upload_them(tmp_path):
    made, _ = load_arguments(tmp_path, grpo=", log_completions: true")
    assert made.log_completions is False
    upload = ", log_completions: true, log_completions_hub_repo: me/x"
    made, _ = load_arguments(tmp_path, grpo=upload)
    assert made.log_completions is True
    assert made.num_completions_to_print == 0
    assert made.log_completions_hub_repo == "me/x"


def test_an_integer_becomes_a_float_and_no_tracker_an_empty_list(tmp_path):
    made, _ = load_arguments(tmp_path, grpo=", adam_beta1: 0, save_steps: 5, report_to: null")
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
def test_a_missing_package_is_an_error_before_anything_is_loaded(tmp_path, grpo, words):
    _, config = load_arguments(tmp_path, grpo=grpo)
    with pytest.raises(MissingExtraError) as refused:
        require_packages(config)
    assert words in str(refused.value)
    assert "fix: pip install " in str(refused.value)
    require_packages(load_arguments(tmp_path, grpo=", report_to: kubeflow, optim: sgd")[1])


@pytest.mark.parametrize("model_setting", [False, True, None])
@pytest.mark.parametrize("argument", [True, False])
def test_gradient_checkpointing_follows_the_setting_of_the_model(tmp_path, model_setting, argument):
    """If the model did not come from FastLanguageModel (None), TRL's argument has effect."""
    policy = make_policy()
    if model_setting is not None:
        apply_checkpointing(policy, model_setting, max_seq_length=None)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=ones,
        args=trl_arguments(tmp_path, max_steps=1, gradient_checkpointing=argument),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert trainer.model.get_base_model().is_gradient_checkpointing is (
        argument if model_setting is None else model_setting
    )
