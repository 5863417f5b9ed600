"""Dynamic sampling and the curriculum: logs, report, resume after SIGKILL, several ranks."""

from __future__ import annotations

import os
import signal

import pytest
import rank_world as ranks
import train_world as world

from toolkit.train.checkpointing import checkpoint

REWARDS = """\
import hashlib
import time

def value(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 997 / 997

def hard(prompts, completions, log_metric, **_):
    log_metric("scored", len(prompts))
    return [0.0 if p[:2] in ("10", "11") else value(c) for p, c in zip(prompts, completions)]

def slow(prompts, completions, log_metric, **_):
    time.sleep(0.1)
    return hard(prompts, completions, log_metric)
"""
BOTH = (
    'reward.functions=[{name: "hard_rewards:hard"}]',
    "runtime.allow_code=[hard_rewards]",
    "grpo.dynamic_sampling=true",
    "grpo.max_resample_times=8",
    "grpo.curriculum=true",
)
SLOW = (*BOTH, 'reward.functions=[{name: "hard_rewards:slow"}]')
HALF = ("grpo.per_device_train_batch_size=4",)
COMPLETIONS = "completions.jsonl"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    made = world.make_run_files(tmp_path_factory.mktemp("w"), steps=6)
    (made.parent / "hard_rewards.py").write_text(REWARDS)
    return made


def train(run_file, run_dir, *overrides):
    out = run_dir.with_suffix(".txt")
    pid = world.fork_run(run_file, out, f'runtime.output_dir="{run_dir}"', *overrides)
    assert world.wait_for_exit(pid) == 0, out.read_text()
    return out.read_text()


def check_counts(run_dir, batch=8):
    """Check that metrics and completions agree on the sampled and the trained completions."""
    metrics, completions = world.read_rows(run_dir), world.read_rows(run_dir, COMPLETIONS)
    for row in (row for row in metrics if "dynamic_sampling/rounds" in row):
        mine = [one for one in completions if one["step"] == row["step"]]
        sampled, discarded = (
            row[f"dynamic_sampling/{name}_completions"] for name in ("sampled", "discarded")
        )
        assert len(mine) == batch == sampled - discarded
        groups = [mine[place : place + 4] for place in range(0, batch, 4)]
        flat = [g for g in groups if len({one["reward"] for one in g}) == 1]
        assert row["dynamic_sampling/no_spread_after"] == len(flat) / len(groups)
        rounds = [one["extra"]["resample_round"] for one in mine]
        assert max(rounds) <= row["dynamic_sampling/rounds"]
        assert (row["dynamic_sampling/no_spread_before"] > 0) == (discarded > 0)
    return metrics


def test_the_counts_in_the_logs_add_up_and_the_report_shows_them(run_file, tmp_path):
    run_dir = tmp_path / "run"
    output = train(run_file, run_dir, *BOTH, "grpo.max_steps=4")
    metrics = check_counts(run_dir)
    assert len(metrics) == 4
    assert sum(row["dynamic_sampling/rounds"] for row in metrics) > 0
    assert all(row["dynamic_sampling/no_spread_after"] == 0 for row in metrics)
    assert metrics[-1]["curriculum/measured_share"] > metrics[0]["curriculum/measured_share"] > 0
    assert "-> 0%" in output
    page = (run_dir / "report.html").read_text()
    for words in ("Dynamic sampling", "were not trained on", "Curriculum", "at most 8 rounds"):
        assert words in page
    assert "choice.spread" in (run_dir / "checkpoint-4" / "rank-0.safetensors").read_bytes().decode(
        "latin-1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_a_killed_run_resumes_to_the_same_bytes(run_file, tmp_path, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    more = (*SLOW, f"runtime.engine={engine}", "grpo.max_steps=8", "grpo.save_steps=1")
    train(run_file, tmp_path / "whole", *more)
    check_counts(tmp_path / "whole")
    for steps in (2, 4, 6):
        run_dir = tmp_path / f"cut-{steps}"
        place = f'runtime.output_dir="{run_dir}"'
        pid = world.fork_run(run_file, tmp_path / "cut.txt", place, *more)
        world.wait_for(lambda: len(world.raw_rows(run_dir)) >= steps)  # noqa: B023
        os.kill(pid, signal.SIGKILL)
        assert world.wait_for_exit(pid) == -signal.SIGKILL
        assert 0 < checkpoint.list_steps(run_dir)[0] < 8
        train(run_file, run_dir, *more)
        assert world.result_digests(run_dir) == world.result_digests(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_sample_as_one_does_and_resume_to_the_same_bytes(run_file, tmp_path):
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    train(run_file, one, *BOTH)
    wait_for_success(ranks.start_ranks(run_file, two, *HALF, *SLOW), two)
    logs = [(tmp_path / f"two-{n}.jsonl").read_text() for n in (0, 1)]
    assert logs[0] == logs[1]  # both ranks have the same metrics and adapter
    check_counts(two)
    texts = [
        [(row["step"], row["prompt"], row["completion"], row["extra"]) for row in drawn]
        for drawn in (world.read_rows(d, COMPLETIONS) for d in (one, two))
    ]
    assert texts[0] == texts[1]
    assert ranks.adapter_distance(one, two) < 1e-4 < 0.02 < ranks.largest_weight(one)
    for mine, theirs in zip(world.read_rows(one), world.read_rows(two), strict=True):
        names = [name for name in mine if name.startswith(("dynamic_sampling/", "curriculum/"))]
        assert len(names) >= 8
        assert [mine[name] for name in names] == pytest.approx([theirs[name] for name in names])
    pids = ranks.start_ranks(run_file, cut, *HALF, *SLOW)
    world.wait_for(lambda: len(world.raw_rows(cut)) >= 3)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [world.wait_for_exit(pid) for pid in pids] == [-signal.SIGKILL] * 2
    wait_for_success(ranks.start_ranks(run_file, cut, *HALF, *SLOW), cut)
    assert world.result_digests(cut) == world.result_digests(two)


def wait_for_success(pids, run_dir):
    codes = [world.wait_for_exit(pid) for pid in pids]
    assert codes == [0] * len(pids), ranks.printed_by_ranks(run_dir, len(pids))


@pytest.mark.slow
def test_three_ranks_with_groups_on_two_of_them_agree(run_file, tmp_path):
    """12 completions are 3 groups. Each of 3 ranks has one whole group. With 2 ranks, one group is
    divided between both ranks.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    train(run_file, one, *BOTH, "grpo.per_device_train_batch_size=12")
    check_counts(one, batch=12)
    wait_for_success(
        ranks.start_ranks(run_file, two, *BOTH, "grpo.per_device_train_batch_size=6"), two
    )
    three = tmp_path / "three"
    wait_for_success(ranks.start_ranks(run_file, three, *BOTH, *HALF, size=3), three)
    for run_dir in (two, three):
        check_counts(run_dir, batch=12)
        # 3 ranks sample a multiple of 3 groups in a round, which may be more than one rank samples.
        rows = [world.read_rows(d, COMPLETIONS) for d in (one, run_dir)]
        first = [[(r["prompt"], r["completion"]) for r in found[:12]] for found in rows]
        kept = [pair for pair, r in zip(first[0], rows[0], strict=False)
                if not r["extra"]["resample_round"]]  # fmt: skip
        assert set(kept) <= set(first[1])
        assert all(row["dynamic_sampling/no_spread_after"] == 0 for row in world.read_rows(run_dir))


@pytest.mark.slow
def test_a_curriculum_that_is_enabled_later_begins_without_records(run_file, tmp_path):
    run_dir = tmp_path / "run"
    off = (*BOTH, "grpo.curriculum=false", "grpo.dynamic_sampling=false", "grpo.save_steps=1")
    train(run_file, run_dir, *off, "grpo.max_steps=2")
    on = (*BOTH, "grpo.max_steps=4")
    changed = "[grpo.curriculum, grpo.dynamic_sampling, grpo.max_steps]"
    train(run_file, run_dir, *on, f"runtime.allow_changed={changed}")
    rows = world.read_rows(run_dir)
    assert [row.get("curriculum/repeated_share") for row in rows] == [None, None, 0, 0.5]
