"""After an out-of-memory error, a step is computed in parts and has the same gradient. A step with
NaN or infinite values is skipped.
"""

from __future__ import annotations

import errno
import math

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file
from trainer_helpers import make_trainer

from toolkit.base.errors import ConfigError, NodeError
from toolkit.base.paths import write_file
from toolkit.train.step import step_errors
from toolkit.train.trainer import GRPOTrainer


class OutOfMemoryTrainer(GRPOTrainer):
    """Raises an out-of-memory error if a training forward has more than ``limit`` tokens."""

    limit = 30
    refused = 0
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *rest, **kwargs):
        output = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, *rest, **kwargs
        )
        computed = [n for n in range(len(attention_mask)) if n not in self._scope.skipped]
        if torch.is_grad_enabled() and attention_mask[computed].sum() > self.limit:
            type(self).refused += 1
            raise self.error
        return output


def trained_values(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "luspo"])
def test_a_step_in_parts_has_the_gradient_of_the_whole(tmp_path, loss_type, caplog):
    grpo = {"loss_type": loss_type, "max_steps": 2, "gradient_accumulation_steps": 2, "beta": 0.05}
    grpo |= {"optim": "sgd", "learning_rate": 0.1}  # Adam would amplify rounding errors
    whole = make_trainer(tmp_path / "a", **grpo)
    whole.train()
    OutOfMemoryTrainer.refused = 0
    parts = make_trainer(tmp_path / "b", kind=OutOfMemoryTrainer, **grpo)
    parts.train()
    assert parts.min_parts >= 4
    # The whole micro-batch and a half do not fit. Smaller parts fit, also in the next step.
    assert OutOfMemoryTrainer.refused >= 2
    assert f"the micro-batch is split into {parts.min_parts} parts from now on" in caplog.text
    torch.testing.assert_close(trained_values(parts), trained_values(whole), atol=1e-6, rtol=1e-4)
    rows = [[r for r in t.state.log_history if "loss" in r] for t in (parts, whole)]
    for split_row, whole_row in zip(*rows, strict=True):
        assert split_row["loss"] == pytest.approx(whole_row["loss"], abs=1e-6)
        assert split_row["grad_norm"] == pytest.approx(whole_row["grad_norm"], rel=1e-3)
        assert split_row["reward"] == whole_row["reward"]


def test_an_out_of_memory_error_without_a_text_splits_the_step(tmp_path, caplog):
    class Bare(OutOfMemoryTrainer):
        error = MemoryError()

    make_trainer(tmp_path, kind=Bare, max_steps=1).train()
    assert "the micro-batch is split into 2 parts from now on (MemoryError)" in caplog.text


def test_memory_that_never_suffices_is_an_error(tmp_path):
    class Never(OutOfMemoryTrainer):
        limit = 0

    trainer = make_trainer(tmp_path, kind=Never)
    with pytest.raises(torch.OutOfMemoryError) as refused:
        trainer.train()
    assert trainer.min_parts == 8  # one row per part
    translated = step_errors.translate(refused.value, "here")
    assert isinstance(translated, ConfigError)
    assert "per_device_train_batch_size" in translated.fix


def test_a_micro_batch_that_must_stay_whole_is_not_split(tmp_path):
    trainer = make_trainer(tmp_path, kind=OutOfMemoryTrainer, top_entropy_quantile=0.5)
    with pytest.raises(RuntimeError, match="cannot be split"):
        trainer.train()


def test_a_rollout_that_does_not_fit_is_repeated_in_halves(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=2)
    generate, seen = trainer.model.generate, []

    def narrow(*args, **kwargs):
        rows = kwargs["input_ids"].shape[0]
        seen.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(*args, **kwargs)

    trainer.model.generate = narrow
    trainer.train()
    assert seen == [8, 4] + [2] * 8  # a size that did not fit is not tried again
    assert (
        "rollout: out of memory with 8 sequences. From now on at most 4 run at a time"
        in caplog.text
    )
    assert trainer.state.global_step == 2


class NanLossTrainer(GRPOTrainer):
    """Its loss is NaN in the micro-steps ``at``."""

    at = (1,)

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss * math.nan if self._step in self.at else loss


def test_a_step_with_a_nan_loss_is_skipped_and_counted(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, kind=NanLossTrainer, max_steps=3, save_strategy="steps", save_steps=1
    )
    trainer.train()
    first, second = (
        load_file(tmp_path / f"checkpoint-{n}/adapter_model.safetensors") for n in (1, 2)
    )
    third = load_file(tmp_path / "checkpoint-3/adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)
    assert all(torch.isfinite(tensor).all() for tensor in third.values())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row.get("skipped") for row in rows] == [None, 1.0, None]
    assert trainer.bad_steps == 0
    assert "step 2 skipped: loss or gradient is not finite (1 in a row)" in caplog.text


def test_the_run_stops_at_the_limit_of_bad_steps_and_saves_the_batch(tmp_path):
    class Always(NanLossTrainer):
        at = range(1, 100)

    trainer = make_trainer(tmp_path, kind=Always, max_steps=9, save_strategy="steps", save_steps=1)
    trainer.max_bad_steps = 2
    with pytest.raises(ConfigError, match="not finite for 2 steps in a row, up to step 3"):
        trainer.train()
    saved = load_file(tmp_path / "bad-step-3-rank-0.safetensors")
    assert any(name.endswith("completion_ids") for name in saved)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl"), ConfigError, 1),
        (OSError(errno.EROFS, "Read-only file system", "/x"), ConfigError, 1),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), NodeError, 3),
        (RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"), NodeError, 3),
        (MemoryError(), ConfigError, 1),
        (RuntimeError("x_cuda does not have a deterministic implementation"), ConfigError, 1),
        (OfflineModeIsEnabled("offline"), ConfigError, 1),
    ],
)
def test_known_faults_have_an_exit_code_and_a_fix(error, kind, code):
    translated = step_errors.translate(error, "runs/x")
    assert type(translated) is kind
    assert translated.exit_code == code
    assert translated.fix
    assert "\n" not in translated.message


def test_a_defect_is_not_translated():
    assert step_errors.translate(KeyError("x"), "here") is None
    assert step_errors.translate(RuntimeError("shapes do not match"), "here") is None


def test_a_folder_at_the_path_of_a_file_is_an_error_with_its_path(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        write_file(tmp_path / "x", "text")
    translated = step_errors.translate(raised.value, "here")
    assert isinstance(translated, ConfigError)
    assert translated.where == str(tmp_path / "x")
