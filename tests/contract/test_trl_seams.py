"""The internals of TRL 1.16 and transformers 5.17 that toolkit.train depends on."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import Trainer
from trl import GRPOConfig
from trl import GRPOTrainer as Upstream

from toolkit.config.explain import explain
from toolkit.train.report.metrics_log import RENAMED_METRICS
from toolkit.train.step import importance_sampling
from toolkit.train.trainer import GRPOTrainer
from toolkit.train.trainer_seam import CompletionBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "train"))
from trainer_helpers import ROWS, arguments, make_policy, make_trainer, ones, put_engine, short

pytestmark = pytest.mark.contract

OVERRIDDEN = {
    Upstream: [
        "_generate",
        "_generate_single_turn",
        "_tool_call_loop",
        "_calculate_rewards",
        "_generate_and_score_completions",
        "_compute_loss",
        "_get_per_token_logps_and_entropies",
        "_prepare_inputs",
        "training_step",
        "compute_loss",
        "log",
        "_get_train_sampler",
    ],
    Trainer: [
        "_get_grad_norm",
        "_maybe_log_save_evaluate",
        "_evaluate",
        "evaluation_loop",
        "_save_checkpoint",
        "_finalize_training",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "train",
    ],
}


def test_the_pinned_release():
    assert trl.__version__ == "1.16.0"


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in OVERRIDDEN.items() for name in names]
)
def test_overridden_methods_have_the_upstream_signature(owner, name):
    upstream_parameters = inspect.signature(getattr(owner, name)).parameters
    our_parameters = inspect.signature(getattr(GRPOTrainer, name)).parameters
    assert name in vars(GRPOTrainer) or any(name in vars(c) for c in GRPOTrainer.__mro__[1:2])
    accepts_any = any(p.kind is p.VAR_POSITIONAL for p in our_parameters.values())
    assert accepts_any or list(our_parameters) == list(upstream_parameters), (
        name,
        list(upstream_parameters),
    )


def test_a_trainer_that_was_never_initialised_can_use_every_default():
    trainer = object.__new__(GRPOTrainer)
    assert trainer._attempt is None
    assert trainer._loss_inputs is None
    assert trainer.signals is None
    assert trainer.timers.pop_seconds() == {}


def test_generate_may_replace_prompts_and_rows_of_the_batch(tmp_path):
    """rollout/dynamic_sampling writes other prompts into the lists that TRL uses afterwards."""
    scored = []

    class Replacing(Upstream):
        def _generate_and_score_completions(self, inputs):
            self.inputs = inputs
            return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts):
            generated = super()._generate(prompts)
            assert len(generated) == len(CompletionBatch._fields)
            prompts[0], self.inputs[0] = "other", {**self.inputs[0], "answer": "another"}
            return generated

        def _calculate_rewards(self, inputs, prompts, *args):
            scored.append((inputs[0]["answer"], prompts[0]))
            return super()._calculate_rewards(inputs, prompts, *args)

    trainer = make_trainer(tmp_path, kind=Replacing, max_steps=1)
    trainer.train()
    assert scored == [("another", "other")]
    assert trainer._logs["prompt"][0] == "other"


TRL_LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"


def distinct_rewards(completions, **_):
    """A reward that gives every row an advantage. Rows without an advantage are left out of the
    forward pass.
    """
    return [int(hashlib.sha256(c.encode()).hexdigest(), 16) % 997 / 997 for c in completions]


def train_run(folder, monkeypatch, *, redundant: bool, **grpo):
    if not redundant:
        monkeypatch.setattr(importance_sampling, "old_logps_are_redundant", lambda _: False)
    trainer = make_trainer(folder, engine=True, rewards=distinct_rewards, max_steps=3, **grpo)
    forwards = []
    original = GRPOTrainer.logps_and_entropies

    def counted(self, *args, **kwargs):
        forwards.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "logps_and_entropies", counted)
    trainer.train()
    monkeypatch.undo()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    weights = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    return rows, torch.cat([w.flatten() for w in weights]), forwards


@pytest.mark.filterwarnings("ignore:the mean importance weight is 0:UserWarning")
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_skipping_the_redundant_forward_changes_nothing(tmp_path, monkeypatch, mode):
    # Training does not apply this filter of sampling, so no importance weight is 1.
    filtered = {"generation_kwargs": {"typical_p": 0.4}}
    clip = {"vllm_importance_sampling_clip_min": 0.2, "vllm_importance_sampling_clip_max": 0.9}
    grpo = {"vllm_importance_sampling_mode": mode, **clip, **filtered}
    upstream_run = train_run(tmp_path / "a", monkeypatch, redundant=False, **grpo)
    our_run = train_run(tmp_path / "b", monkeypatch, redundant=True, **grpo)
    torch.testing.assert_close(our_run[1], upstream_run[1], atol=1e-5, rtol=0)
    assert upstream_run[2].count(False) == 3
    assert our_run[2].count(False) == 0
    for our_row, upstream_row in zip(our_run[0], upstream_run[0], strict=True):
        names = {name for name in upstream_row if name.startswith("sampling/")}
        assert names == {name for name in our_row if name.startswith("sampling/")}
        assert len(names) == 7
        for name in names:
            assert our_row[name] == pytest.approx(upstream_row[name], abs=2e-6), name
        assert our_row["sampling/logp_gap_mean"] > 0.1
        assert our_row["sampling/logp_gap_mean"] == pytest.approx(
            upstream_row[TRL_LOGP_DIFFERENCE], abs=2e-6
        )
        assert our_row["sampling/importance_sampling_ratio/mean"] < 0.9


def test_the_forward_is_skipped_exactly_when_it_is_redundant(tmp_path):
    def is_redundant(lora=None, **grpo):
        return importance_sampling.old_logps_are_redundant(
            make_trainer(tmp_path, engine=True, lora=lora, **grpo)
        )

    assert is_redundant()
    assert is_redundant(gradient_accumulation_steps=2)
    assert is_redundant(gradient_accumulation_steps=4, steps_per_generation=2)
    assert not is_redundant(num_iterations=2)
    assert not is_redundant(steps_per_generation=2)
    assert not is_redundant(vllm_importance_sampling_correction=False)
    assert not is_redundant(lora={"lora_dropout": 0.1})


GRPO_OPTIONS = {
    **{loss: {"loss_type": loss} for loss in ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo")},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    "num_iterations": {"num_iterations": 2},
    "beta": {"beta": 0.1},
    "steps_per_generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "no correction": {"vllm_importance_sampling_correction": False},
    "off-policy mask": {"off_policy_mask_threshold": 0.5},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "truncated masked": {"mask_truncated_completions": True},
    "generation options": {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("name", GRPO_OPTIONS)
def test_trls_options_run_on_an_engine(tmp_path, name):
    trainer = make_trainer(tmp_path, engine=True, max_steps=2, **GRPO_OPTIONS[name])
    assert trainer.use_vllm
    assert trainer.args.use_vllm is False  # the passed value
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    first_row = rows[0]
    assert first_row["sampling/logp_gap_max"] >= first_row["sampling/logp_gap_mean"] >= 0
    assert ("kl" in first_row) == (name == "beta")
    if name != "generation options":  # there the trainer scores the unfiltered distribution
        assert first_row["sampling/logp_gap_max"] < 1e-4


def test_several_rewards_and_evaluation_on_an_engine(tmp_path):
    trainer = make_trainer(
        tmp_path,
        engine=True,
        rewards=[ones, short],
        reward_weights=[1.0, 0.5],
        eval_rows=ROWS[:4],
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    trainer.train()
    rows = trainer.state.log_history
    assert any("rewards/short/mean" in row for row in rows)
    assert [row["step"] for row in rows if "eval_reward" in row] == [1, 2]
    assert all("eval_sampling/logp_gap_max" in row for row in rows if "eval_reward" in row)


def test_the_engine_sleeps_while_the_trainer_works(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, engine=True, max_steps=2)
    engine, calls = trainer.vllm_generation.engine, []

    def record_calls(owner, name):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(name) or method(*a, **k))

    for name in ("publish", "generate", "sleep"):
        record_calls(engine, name)
    record_calls(Upstream, "_compute_loss")
    trainer.train()
    assert calls == ["publish", "generate", "sleep", "_compute_loss"] * 2


def test_use_vllm_in_the_arguments_is_served_by_the_engine_on_the_model(tmp_path):
    model = make_policy()
    tokenizer = make_trainer(tmp_path).processing_class
    put_engine(model, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=ones,
        args=arguments(tmp_path, use_vllm=True, generation_kwargs={"typical_p": 0.9}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    assert type(trainer.vllm_generation).__module__ == "toolkit.train.rollout.sampler"
    assert trainer.args.use_vllm
    assert trainer.args.generation_kwargs == {"typical_p": 0.9}
    assert trainer.vllm_generation.sampling_options(1).extra == {"typical_p": 0.9}


def test_vespo_needs_a_token_mode(tmp_path):
    with pytest.raises(ValueError, match="vespo loss needs a token-level mode"):
        make_trainer(tmp_path, engine=True, loss_type="vespo")


def test_config_fields_that_arguments_sets_exist():
    fields = GRPOConfig.__dataclass_fields__
    for name in ("report_to", "use_cpu", "bf16", "logging_steps", "reward_weights", "save_steps"):
        assert name in fields


def test_every_metric_of_trl_is_explained() -> None:
    source = inspect.getsource(Upstream)
    metrics = set(re.findall(r'self\._metrics\[mode\]\[f?"([^"]+)"\]', source))
    assert len(metrics) > 20
    names = {RENAMED_METRICS.get(name, re.sub(r"\{.*?\}", "some_reward", name)) for name in metrics}
    assert [name for name in sorted(names) if explain(name) is None] == []
