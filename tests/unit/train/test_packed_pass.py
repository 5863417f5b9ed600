"""The packed pass gives the same metrics and the same gradient as TRL's padded pass."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trainer_helpers import ROWS, arguments, make_trainer, ones

from toolkit.train.demo import make_model, make_tokenizer
from toolkit.train.grpo_config import GRPOConfig
from toolkit.train.trainer import GRPOTrainer


class PaddedTrainer(GRPOTrainer):
    def __init__(self, *, args, **kwargs):
        args.padding_free = False
        super().__init__(args=args, **kwargs)


def adapter_change(trainer):
    """Train with SGD and return the change of the adapter, which shows the gradients."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return torch.cat([(after[n].detach() - p).flatten() for n, p in before.items()])


def loss_rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    "a reference": {"beta": 0.1},
    "two iterations": {"num_iterations": 2},
    "two steps a generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "an entropy bonus": {"entropy_coef": 0.01},
    "high-entropy tokens": {"top_entropy_quantile": 0.33},
    "truncated completions are masked": {"mask_truncated_completions": True},
    "a truncated policy": {"top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.3},
    "micro-batches of two rows": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
}


SLOW = pytest.mark.slow
LONG = ("an entropy bonus", "high-entropy tokens", "truncated completions are masked")
GRADIENTS = {
    "optim": "sgd",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "max_steps": 2,
}
CLOCKS = ("time", "runtime", "per_second")


def train(folder, kind, **grpo):
    trainer = make_trainer(folder, kind=kind, **{**GRADIENTS, **grpo})
    return trainer, adapter_change(trainer)


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        *(pytest.param(case, True, marks=SLOW if case in LONG else ()) for case in CASES),
        ("grpo", False),
        pytest.param("two iterations", False, marks=SLOW),
    ],
)
def test_packs_give_the_gradient_and_the_metrics_of_a_padded_batch(tmp_path, case, engine):
    packed, packed_change = train(tmp_path / "a", GRPOTrainer, engine=engine, **CASES[case])
    padded, padded_change = train(tmp_path / "b", PaddedTrainer, engine=engine, **CASES[case])
    assert packed._reason_against_packs(packed.model) is None
    assert padded_change.norm() > 0
    assert (packed_change - padded_change).norm() < 1e-5 * padded_change.norm()
    for packed_row, padded_row in zip(loss_rows(packed), loss_rows(padded), strict=True):
        assert packed_row.keys() >= padded_row.keys()
        for name, value in padded_row.items():
            # The packed pass leaves out rows with the advantage 0. The entropy lacks these rows.
            tolerance = 1e-2 if name == "entropy" else 1e-5
            if not any(clock in name for clock in CLOCKS):
                assert packed_row[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name


def test_a_model_without_an_adapter_has_a_separate_reference(tmp_path):
    """TRL loads a second model as the reference. The head of this model computes no entropy."""
    make_model(3).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    results = {}
    for kind in (GRPOTrainer, PaddedTrainer):
        trainer = kind(
            model=str(tmp_path / "model"),
            reward_funcs=ones,
            args=arguments(tmp_path / kind.__name__, GRPOConfig, beta=0.1, **GRADIENTS),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=make_tokenizer(),
        )
        results[kind] = adapter_change(trainer), [row["kl"] for row in loss_rows(trainer)]
    (packed_change, kl), (padded_change, padded_kl) = results[GRPOTrainer], results[PaddedTrainer]
    assert padded_change.norm() > 0
    assert (packed_change - padded_change).norm() < 1e-5 * padded_change.norm()
    assert kl == pytest.approx(padded_kl, rel=1e-4, abs=1e-7)
    assert max(kl) > 0
