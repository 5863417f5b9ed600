"""A run that resumes from a checkpoint gives the same bits as a run that never stopped."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from trainer_helpers import ROWS, adapter_digest, history, make_trainer

from toolkit.base.errors import ConfigError, InputError
from toolkit.train.checkpointing import checkpoint, state_files, trainer_state

CASES = {
    "plain": ({}, [2, 4]),
    # 12 steps per epoch
    "epochs": ({"max_steps": -1, "num_train_epochs": 2}, [12, 14]),
    "a generation feeds two steps": (
        {
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
        [1, 2],
    ),
    "two iterations": ({"num_iterations": 2}, [1, 4]),
    "reference and dropout": ({"beta": 0.1}, [3]),
}
LONG = {
    ("epochs", False), ("two iterations", False), ("epochs", True), ("two iterations", True),
    ("reference and dropout", True), ("a generation feeds two steps", True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param(name, engine, marks=[pytest.mark.slow] if (name, engine) in LONG else [])
        for name, engine in [*((name, False) for name in CASES), *((name, True) for name in CASES)]
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, name, engine):
    grpo, stops = CASES[name]
    lora = {"lora_dropout": 0.1} if "dropout" in name else {}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "a", engine=engine, lora=lora, **saving, **grpo)
    whole.train()
    for stop in stops:
        again = make_trainer(tmp_path / "b", engine=engine, lora=lora, **grpo)
        random.seed(99)
        np.random.seed(99)
        torch.manual_seed(99)
        again.train(str(tmp_path / "a" / f"checkpoint-{stop}"))
        assert adapter_digest(again) == adapter_digest(whole), stop
        assert history(again) == history(whole), stop


def test_resume_true_skips_an_incomplete_checkpoint_with_a_message(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, **saving)
    whole.train()
    (tmp_path / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert adapter_digest(again) == adapter_digest(whole)
    assert "checkpoint-6: optimizer.safetensors has 0 bytes" in caplog.text


def test_an_incomplete_checkpoint_that_was_named_is_an_error(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "rank-0.json").unlink()
    with pytest.raises(ConfigError, match=r"rank-0.json is missing"):
        make_trainer(tmp_path).train(str(tmp_path / "checkpoint-2"))


def change_json(folder, name, change):
    """Change a JSON file of a checkpoint, and update the checksums so that they match."""
    described = json.loads((folder / name).read_text())
    (folder / name).write_text(change(described))
    listed = checkpoint._checksums_text(checkpoint._digests(folder))
    (folder / checkpoint.CHECKSUMS_FILE).write_text(listed)
    assert checkpoint.find_faults(folder) == []


def with_values(**values):
    return lambda described: json.dumps({**described, **values})


def huge_generator(kind):
    def change(described):
        described["generators"][kind][1][0] = 10**30
        return json.dumps(described)

    return change


def load_all(trainer, folder):
    trainer_state.check_checkpoint(trainer, folder)
    trainer_state.load_progress(trainer, folder)
    trainer_state.load_generators(trainer, folder)


def test_a_hostile_checkpoint_is_an_error_with_a_message(tmp_path):
    sound, forged = tmp_path / "checkpoint-2", tmp_path / "forged"
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    cases = [
        ("state.json", with_values(world_size="1"), "world_size is missing, or not of type int"),
        ("state.json", lambda _: "[" * 200_000, "cannot be read as JSON"),
        ("state.json", lambda _: "[]", "world_size is missing, or not of type int"),
        (
            "state.json",
            with_values(counters={}),
            "the state in the checkpoint cannot be used: KeyErr",
        ),
        ("state.json", with_values(optimizer={"tensor": "x"}), "cannot be used: KeyError"),
        (
            "state.json",
            with_values(scheduler={"value": 1}),
            "the state in the checkpoint cannot be",
        ),
        ("rank-0.json", lambda _: "{}", "the state in the checkpoint cannot be used"),
        (
            "rank-0.json",
            with_values(generators={"python": 1}),
            "the state in the checkpoint cannot be",
        ),
        ("trainer_state.json", with_values(unknown=1), "cannot be used: TypeError"),
        ("trainer_state.json", lambda _: "null", "cannot be used: TypeError"),
        ("trainer_state.json", with_values(epoch=float("inf")), "cannot be used: OverflowError"),
        ("trainer_state.json", with_values(global_step=float("inf")), "global_step is inf"),
        ("trainer_state.json", with_values(global_step=10**30), "global_step is 1000"),
        ("trainer_state.json", with_values(global_step=-1), "global_step is -1"),
        ("rank-0.json", huge_generator("python"), "cannot be used: OverflowError"),
        ("rank-0.json", huge_generator("numpy"), "cannot be used: OverflowError"),
    ]
    trainer = make_trainer(tmp_path / "b")
    trainer.create_optimizer_and_scheduler(6)
    for name, change, words in cases:
        shutil.rmtree(forged, ignore_errors=True)
        shutil.copytree(sound, forged)
        change_json(forged, name, change)
        with pytest.raises(InputError) as refused:
            load_all(trainer, forged)
        assert words in refused.value.message, (name, words)
    # An evaluation is pending, but the trainer has no evaluation data.
    shutil.rmtree(forged)
    shutil.copytree(sound, forged)
    change_json(forged, "state.json", with_values(pending_evaluation=True))
    load_all(trainer, forged)
    assert trainer.pending_evaluation is False


def test_a_checkpoint_sets_only_the_counters_of_the_trainer(tmp_path):
    folder = tmp_path / "checkpoint-2"
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    counters = json.loads((folder / "state.json").read_text())["counters"]
    change_json(
        folder, "state.json", with_values(counters={**counters, "keep_last": 1, "log": "x"})
    )
    again = make_trainer(tmp_path / "b", max_steps=3)
    again.train(str(folder))
    assert again.keep_last is None
    assert callable(again.log)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda t: t.pop(next(iter(t))), "1 tensors are missing, the first is"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 tensors are unexpected, the first is extra"),
        (
            lambda t: t.update({next(iter(t)): torch.zeros(2, 2)}),
            "has shape [2, 2], but the model needs",
        ),
        (lambda t: next(iter(t.values())).fill_(float("nan")), "has NaN or infinite values"),
    ],
    ids=["missing", "extra", "rank", "nan"],
)
def test_an_adapter_with_other_tensors_is_an_error_with_the_difference(
    tmp_path, change, difference
):
    trainer = make_trainer(tmp_path)
    parameters = state_files.trainable_parameters(trainer.model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    stored = {name: p.detach().clone() + 1 for name, p in parameters.items()}
    change(stored)
    with pytest.raises(ConfigError) as refused:
        state_files.copy_into_parameters(parameters, stored, "here")
    assert difference in refused.value.message
    assert all(torch.equal(before[name], p) for name, p in parameters.items())


def test_another_world_size_is_an_error(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    described = json.loads((folder / "state.json").read_text())
    shutil.copytree(folder, tmp_path / ".checkpoint-2.partial")
    (tmp_path / ".checkpoint-2.partial" / "checksums.json").unlink()
    described["world_size"] = 2
    (tmp_path / ".checkpoint-2.partial" / "state.json").write_text(json.dumps(described))
    checkpoint.commit(tmp_path / ".checkpoint-2.partial", 2)
    with pytest.raises(ConfigError, match="written by 2 processes, but this run has 1") as refused:
        make_trainer(tmp_path).train(str(folder))
    assert "--nproc-per-node 2" in refused.value.fix


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    suffixes = {file.suffix for file in (tmp_path / "checkpoint-2").iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_peft_can_load_the_adapter_of_a_checkpoint(tmp_path):
    peft = pytest.importorskip("peft")
    from toolkit.train.demo import make_model

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    loaded = peft.PeftModel.from_pretrained(make_model(7), tmp_path / "checkpoint-2")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_every_random_generator_is_restored():
    described, tensors = state_files.generator_states()
    described = json.loads(json.dumps(described))
    drawn = [random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn()]
    state_files.restore_generators(described, tensors)
    assert [random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn()] == drawn


def test_unflatten_restores_the_flattened_value():
    value = {"a": [1, 2.5, None, (True, "x")], 3: {"t": torch.arange(6).reshape(2, 3)}}
    tensors: dict[str, torch.Tensor] = {}
    described = json.loads(json.dumps(state_files.flatten(value, tensors, "v")))
    back = state_files.unflatten(described, tensors)
    assert back["a"] == value["a"]
    assert type(back["a"][3]) is tuple
    assert torch.equal(back[3]["t"], value[3]["t"])
    with pytest.raises(NotImplementedError, match="a set cannot be stored without pickle"):
        state_files.flatten({"s": {1}}, {}, "v")


def test_the_best_checkpoints_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=6)
    trainer.keep_last, trainer.keep_best = 1, 2
    trainer.train()
    rewards = {row["step"]: row["reward"] for row in trainer.state.log_history if "reward" in row}
    best = sorted(rewards, key=lambda step: rewards[step])[-2:]
    assert set(checkpoint.list_steps(tmp_path)) >= {6}
    assert len(checkpoint.list_steps(tmp_path)) <= 3
    assert max(rewards, key=lambda step: rewards[step]) in checkpoint.list_steps(tmp_path)
    assert set(trainer_state.best_steps(tmp_path, 2)) <= {*best, *checkpoint.list_steps(tmp_path)}


def test_an_interrupted_evaluation_is_repeated_after_resume(tmp_path):
    whole = make_trainer(
        tmp_path / "a", eval_rows=ROWS[:4], eval_strategy="steps", eval_steps=2, max_steps=4
    )
    whole.train()
    interrupted = make_trainer(
        tmp_path / "b", eval_rows=ROWS[:4], eval_strategy="steps", eval_steps=2, max_steps=4
    )
    from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals

    interrupted.signals = StopSignals()
    interrupted._metrics["eval"]
    original = interrupted.evaluation_loop

    def interrupt_evaluation(*args, **kwargs):
        original(*args, **kwargs)
        raise StepAbandoned("SIGTERM")

    interrupted.evaluation_loop = interrupt_evaluation
    with pytest.raises(StepAbandoned):
        interrupted.train()
    assert interrupted.snapshot.pending_evaluation
    interrupted.save_snapshot(interrupted.snapshot)
    resumed = make_trainer(
        tmp_path / "b", eval_rows=ROWS[:4], eval_strategy="steps", eval_steps=2, max_steps=4
    )
    resumed.train(str(tmp_path / "b" / "checkpoint-2"))
    assert adapter_digest(resumed) == adapter_digest(whole)

    def evaluations(trainer):
        rows = [r for r in trainer.state.log_history if "eval_reward" in r]
        return [
            {k: v for k, v in r.items() if "per_second" not in k and "runtime" not in k}
            for r in rows
        ]

    assert evaluations(resumed) == evaluations(whole)
    assert [row["step"] for row in evaluations(resumed)] == [2, 4]
