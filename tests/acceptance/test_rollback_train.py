"""A run that resumes from an older checkpoint loses no files and does not mix the two branches."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import train_world as world

from toolkit.train.checkpointing import branch, checkpoint

CHANGED = ("grpo.temperature=0.7", "runtime.allow_changed=[grpo.temperature]")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    return world.make_run_files(tmp_path_factory.mktemp("w"))


def run_forked(run_file, run_dir, *overrides, before=None):
    out = run_dir.with_suffix(".txt")
    pid = world.fork_run(
        run_file, out, f'runtime.output_dir="{run_dir}"', *overrides, before=before
    )
    return world.wait_for_exit(pid), out.read_text()


def loadable_checkpoints(run_dir):
    folders = run_dir.glob("checkpoint-*")
    return {folder.name for folder in folders if checkpoint.find_faults(folder) == []}


def stop_at(step):
    """A hook that sends SIGTERM to the run after it has logged the row of ``step``."""

    def install():
        from toolkit.train.report import metrics_log

        write = metrics_log.Recorder.on_log

        def written(self, args, state, *rest, **more):
            write(self, args, state, *rest, **more)
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        metrics_log.Recorder.on_log = written

    return install


def test_a_checkpoint_that_was_rolled_back_to_is_kept(run_file, tmp_path):
    run_dir = tmp_path / "run"
    assert run_forked(run_file, run_dir, "runtime.keep_last=3")[0] == 0
    whole = world.result_digests(run_dir)
    assert loadable_checkpoints(run_dir) == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
    source = f'runtime.resume="{run_dir}/checkpoint-4"'
    code, output = run_forked(
        run_file, run_dir, source, *CHANGED, "runtime.keep_last=1", before=stop_at(6)
    )
    assert code == 75, output
    assert f"moved to {run_dir}/abandoned-1: checkpoint-6, checkpoint-8" in output
    assert "stopped by SIGTERM; checkpoint-6 was saved" in output
    assert "run the command again with --resume auto: it resumes from checkpoint-6, not" in output
    assert loadable_checkpoints(run_dir) == {"checkpoint-4", "checkpoint-6"}
    aside = run_dir / "abandoned-1"
    assert loadable_checkpoints(aside) == {"checkpoint-6", "checkpoint-8"}
    assert world.result_digests(aside) == whole
    assert [row["step"] for row in world.read_rows(run_dir)] == list(range(1, 7))
    assert world.read_rows(run_dir)[4:6] != world.read_rows(aside)[4:6]
    assert not (run_dir / "adapter").exists()
    assert not (run_dir / "report.html").exists()
    # Without runtime.resume, the run resumes from checkpoint-6 of this branch, not from the other.
    code, output = run_forked(run_file, run_dir, *CHANGED, "runtime.keep_last=1")
    assert code == 0, output
    assert f"resume   {run_dir}/checkpoint-6" in output
    straight = tmp_path / "straight"
    assert (
        run_forked(run_file, straight, f'runtime.resume="{run_dir}/checkpoint-4"', *CHANGED)[0] == 0
    )
    assert world.result_digests(straight) == world.result_digests(run_dir) != whole
    # Kept: the start of the branch, the checkpoint that this process resumed from, the last one.
    assert loadable_checkpoints(run_dir) == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}


@pytest.mark.slow
def test_foreign_folders_in_the_run_folder_change_nothing(run_file, tmp_path):
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    assert run_forked(run_file, plain)[0] == 0
    mixed.mkdir()
    strange = [
        "checkpoint-99999999999999999999",
        "checkpoint--1",
        "checkpoint-007",
        "checkpoint-90",
    ]
    for name in strange:
        (mixed / name).mkdir()
        (mixed / name / "x").write_text("mine")
    (mixed / "checkpoint-80").symlink_to(plain / "checkpoint-8")
    code, output = run_forked(run_file, mixed)
    assert code == 0, output
    assert world.result_digests(mixed) == world.result_digests(plain)
    assert branch.valid_steps(mixed) == branch.valid_steps(plain) == [8, 6]
    assert all((mixed / name / "x").read_text() == "mine" for name in strange)
    assert (mixed / "checkpoint-80").is_symlink()
    assert not list(mixed.glob("abandoned-*"))


def test_too_few_prompts_for_one_generation_is_an_error(run_file, tmp_path):
    def load_one_prompt():
        """Like a hub dataset, whose prompts can be counted only after loading."""
        from toolkit.train import user_code

        read = user_code.load_data

        def shorter(*args, **kwargs):
            data = read(*args, **kwargs)
            return dataclasses.replace(data, train=data.train.select([0]))

        user_code.load_data = shorter

    code, output = run_forked(run_file, tmp_path / "run", before=load_one_prompt)
    assert code == 1, output
    assert "the number of prompts is 1, but one generation needs 2 prompts, so no step" in output
    assert "no step would run" in output
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_ends_before_its_last_step_is_an_error(run_file, tmp_path):
    def install():
        from toolkit.train.trainer import GRPOTrainer

        step = GRPOTrainer.training_step

        def short(self, *args, **kwargs):
            self.control.should_training_stop = self.state.global_step >= 2
            return step(self, *args, **kwargs)

        GRPOTrainer.training_step = short

    code, output = run_forked(run_file, tmp_path / "run", before=install)
    assert code == 70, output
    assert "training ended at step" in output
    assert "of 8 for an unknown reason" in output
    assert not (tmp_path / "run" / "adapter").exists()
