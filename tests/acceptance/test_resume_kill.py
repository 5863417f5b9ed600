"""A run that is killed at any point and started again writes the same bytes as an undisturbed run.

The kill points are random, with a fixed seed. A point is a phase, an occurrence of this phase in
the run, and a share of the time that this occurrence took in the undisturbed run. No phase is drawn
a second time before all phases were drawn once. Some runs are killed a second time while they
resume. The test prints each point and the phases in which the kill hit the run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import run_phases as phases
import train_world as world

from toolkit.train.checkpointing import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

STEPS, SEED, KILLED_TWICE = 8, 11, 0.3


@dataclass(frozen=True)
class Undisturbed:
    """The result of an undisturbed run, and the duration of each occurrence of each phase."""

    run_file: Path
    engine: str
    digests: dict[str, str]
    spans: dict[str, list[float]]


@pytest.fixture(
    scope="module",
    params=[
        "transformers",
        pytest.param("vllm", marks=(pytest.mark.engine, pytest.mark.thorough)),
        # Each optimizer step has several packs, which depend only on the completion lengths.
        pytest.param("transformers, pack_tokens: 24", marks=pytest.mark.slow),
    ],
)
def undisturbed(request, tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    if request.param == "vllm":
        pytest.importorskip("vllm")
    run_file = world.make_run_files(tmp_path_factory.mktemp("w"), engine=request.param, steps=STEPS)
    text = run_file.read_text()
    text = text.replace("save_steps: 2", "save_steps: 2\n  eval_strategy: steps\n  eval_steps: 3")
    run_file.write_text(text)
    out = run_file.parent / "whole.txt"
    pid, lines = phases.start_reporting_run(run_file, out)
    phase_lines = list(lines)
    assert world.wait_for_exit(pid) == 0, out.read_text()
    spans = phases.phase_durations(phase_lines)
    assert all(spans.values()), spans
    return Undisturbed(
        run_file, request.param, world.result_digests(run_file.parent / "run"), spans
    )


def kill_in_phase(undisturbed, run_dir, out, generator, phase, *overrides):
    """Kill the run in ``phase``. Return whether it was killed, the phases that were open, and the
    chosen point as text.
    """
    times = undisturbed.spans[phase]
    occurrence = generator.randrange(len(times))
    share = generator.random()
    place = f'runtime.output_dir="{run_dir}"'
    pid, lines = phases.start_reporting_run(undisturbed.run_file, out, place, *overrides)
    seen, remaining = [], occurrence
    for _, line in lines:
        seen.append(line)
        if line == f"> {phase}":
            if remaining == 0:
                time.sleep(share * times[occurrence])
                break
            remaining -= 1
    os.kill(pid, signal.SIGKILL)
    code = world.wait_for_exit(pid)
    seen += [line for _, line in lines]
    hit = phases.open_phases(seen)
    aim = (
        f"{phase} {occurrence + 1} of {len(times)}, {share:.0%} of {times[occurrence] * 1e3:.0f} ms"
    )
    return code == -signal.SIGKILL, hit, aim


def kill_and_resume(undisturbed, tmp_path, points: int) -> None:
    generator = random.Random(f"{SEED} {undisturbed.engine}")
    order: list[str] = []
    while len(order) < points:
        order += generator.sample(phases.PHASES, len(phases.PHASES))
    hits, same, killed = set(), 0, 0
    for point, phase in enumerate(order[:points]):
        run_dir, out = tmp_path / f"run-{point}", tmp_path / f"out-{point}.txt"
        died, hit, aim = kill_in_phase(undisturbed, run_dir, out, generator, phase)
        second_kill = ""
        if generator.random() < KILLED_TWICE:
            second = generator.choice(phases.PHASES)
            _, then, aimed = kill_in_phase(undisturbed, run_dir, out, generator, second)
            second_kill = f"; resumed and killed in {', '.join(then)} ({aimed})"
        override = f'runtime.output_dir="{run_dir}"'
        code = world.wait_for_exit(
            world.fork_run(undisturbed.run_file, out, override, evaluate=True)
        )
        digests = world.result_digests(run_dir) if code == 0 else {}
        ok = digests == undisturbed.digests
        same, killed, hits = same + ok, killed + died, hits | {*hit}
        verdict = "same bytes" if ok else f"NOT the same bytes (exit code {code})"
        where = f"killed in {', '.join(hit)} ({aim}){second_kill}"
        print(f"{undisturbed.engine} {point + 1:2}: {where}: {verdict}")
        assert ok, (digests, undisturbed.digests, out.read_text())
    print(f"{undisturbed.engine}: {same} of {points}, seed {SEED}, killed in {sorted(hits)}")
    # On a busy machine, a run may end before a kill that was chosen for its last moments.
    assert killed >= points * 0.7
    assert len(hits) >= min(points, len(phases.PHASES)) // 2


def test_a_killed_run_resumes_to_the_same_bytes(undisturbed, tmp_path):
    kill_and_resume(undisturbed, tmp_path, 4 if undisturbed.engine == "transformers" else 1)


@pytest.mark.slow
def test_a_run_killed_at_25_points_resumes_to_the_same_bytes(undisturbed, tmp_path):
    kill_and_resume(undisturbed, tmp_path, 25)


CHANGED = ("grpo.temperature=0.7", "runtime.allow_changed=[grpo.temperature]")
BACK = 4


@pytest.fixture(scope="module")
def rolled_back(undisturbed):
    """The folder of a whole run that kept all checkpoints, and the digests of a copy that resumed
    from checkpoint 4 with another temperature.
    """
    folder = undisturbed.run_file.parent
    whole, other = folder / "kept", folder / "other"
    keep = "runtime.keep_last=9"
    for run_dir, more in ((whole, ()), (other, CHANGED)):
        if more:
            shutil.copytree(whole, other)
            more = (f'runtime.resume="{other}/checkpoint-{BACK}"', *more)
        out = folder / f"{run_dir.name}.txt"
        place = f'runtime.output_dir="{run_dir}"'
        pid = world.fork_run(undisturbed.run_file, out, place, keep, *more, evaluate=True)
        assert world.wait_for_exit(pid) == 0, out.read_text()
    assert world.result_digests(whole) == undisturbed.digests != world.result_digests(other)
    return whole, world.result_digests(other)


@pytest.mark.slow
def test_a_run_killed_at_10_points_while_rolling_back_resumes(undisturbed, rolled_back, tmp_path):
    whole, expected = rolled_back
    generator = random.Random(f"{SEED} back {undisturbed.engine}")
    order = generator.sample(phases.PHASES, 10)
    moved = 0
    for point, phase in enumerate(order):
        run_dir, out = tmp_path / f"run-{point}", tmp_path / f"out-{point}.txt"
        shutil.copytree(whole, run_dir)
        more = ("runtime.keep_last=9", *CHANGED)
        source = f'runtime.resume="{run_dir}/checkpoint-{BACK}"'
        _, hit, aim = kill_in_phase(undisturbed, run_dir, out, generator, phase, source, *more)
        # A run that has rolled back resumes by itself. Otherwise the command names the checkpoint.
        settled = any(run_dir.glob("abandoned-*"))
        moved += settled
        again = more if settled else (source, *more)
        place = f'runtime.output_dir="{run_dir}"'
        code = world.wait_for_exit(
            world.fork_run(undisturbed.run_file, out, place, *again, evaluate=True)
        )
        digests = world.result_digests(run_dir) if code == 0 else {}
        print(
            f"{undisturbed.engine} back {point + 1:2}: killed in {', '.join(hit)} ({aim}):"
            f" {'same bytes' if digests == expected else f'NOT the same bytes ({code})'}"
        )
        assert digests == expected, out.read_text()
        asides = sorted(run_dir.glob("abandoned-*"))
        # The abandoned branch is complete in its own folder.
        assert world.result_digests(asides[0]) == undisturbed.digests
        later = {f"checkpoint-{step}" for step in checkpoint.list_steps(whole) if step > BACK}
        assert later <= {folder.name for aside in asides for folder in aside.glob("checkpoint-*")}
        assert all(checkpoint.find_faults(f) == [] for f in run_dir.glob("checkpoint-*"))
    assert moved >= 5
