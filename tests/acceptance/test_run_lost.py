"""A run whose run folder, logs, output pipe or terminal disappears."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import train_world as world
from train_world import default_hang_up_handler  # noqa: F401 - a fixture

from toolkit.train.checkpointing import branch, checkpoint

pytestmark = pytest.mark.thorough

SLOW = """\
import time

def ones(completions, **_):
    time.sleep(0.05)
    return [c.count("1") / max(1, len(c)) for c in completions]
"""
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    made = world.make_run_files(tmp_path_factory.mktemp("w"), steps=6)
    (made.parent / "my_rewards.py").write_text(SLOW)
    return made


@pytest.fixture(scope="module")
def expected(run_file):
    """The digests of an undisturbed run."""
    pid = world.fork_run(run_file, run_file.parent / "out.txt")
    assert world.wait_for_exit(pid) == 0
    return world.result_digests(run_file.parent / "run")


def at_step(step, act):
    """A hook that calls ``act`` after the run has logged the row of ``step``."""

    def install():
        from toolkit.train.report import metrics_log

        write = metrics_log.Recorder.on_log

        def written(self, args, state, *rest, **more):
            write(self, args, state, *rest, **more)
            if state.global_step == step:
                act()

        metrics_log.Recorder.on_log = written

    return install


def run_with(run_file, run_dir, act, *overrides):
    out = run_dir.with_suffix(".txt")
    before = at_step(3, act)
    pid = world.fork_run(
        run_file, out, f'runtime.output_dir="{run_dir}"', *overrides, before=before
    )
    code = world.wait_for_exit(pid)
    output = out.read_text()
    assert output.count("error: ") == (code != 0), output
    assert "Traceback" not in output
    return code, output


def test_a_moved_run_folder_gets_its_checkpoint_at_the_new_path(run_file, expected, tmp_path):
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    code, output = run_with(run_file, run_dir, lambda: run_dir.rename(moved))
    assert code == 1
    assert f"{run_dir}: the run folder was moved during the run, and is now {moved};" in output
    assert "checkpoint-4 was saved" in output
    assert not run_dir.exists()
    assert checkpoint.find_faults(moved / "checkpoint-4") == []
    again = world.fork_run(run_file, tmp_path / "again.txt", f'runtime.output_dir="{moved}"')
    assert world.wait_for_exit(again) == 0
    assert world.result_digests(moved) == expected


@pytest.mark.slow
def test_nothing_is_written_to_a_folder_that_replaced_the_run_folder(run_file, tmp_path):
    run_dir, moved = tmp_path / "run", tmp_path / "moved"

    def replace():
        run_dir.rename(moved)
        run_dir.mkdir()
        (run_dir / "of-another").write_text("mine")

    code, output = run_with(run_file, run_dir, replace)
    assert code == 1
    assert f"was replaced by another folder during the run, and is now {moved}; " in output
    assert "checkpoint-4 was saved" in output
    assert [path.name for path in run_dir.iterdir()] == ["of-another"]
    assert checkpoint.find_faults(moved / "checkpoint-4") == []


def test_a_removed_run_folder_is_not_created_again(run_file, tmp_path):
    run_dir = tmp_path / "run"
    code, output = run_with(run_file, run_dir, lambda: shutil.rmtree(run_dir))
    assert code == 1
    assert "the run folder was removed during the run; nothing was saved" in output
    assert not run_dir.exists()


def test_a_deleted_log_stops_the_run_with_a_checkpoint(run_file, tmp_path):
    run_dir = tmp_path / "run"
    code, output = run_with(run_file, run_dir, (run_dir / "metrics.jsonl").unlink)
    assert code == 1
    assert (
        "metrics.jsonl was removed, replaced or changed by another program during the run" in output
    )
    assert "checkpoint-4 was saved" in output
    assert branch.valid_steps(run_dir) == [4, 2]
    out = tmp_path / "again.txt"
    assert (
        world.wait_for_exit(world.fork_run(run_file, out, f'runtime.output_dir="{run_dir}"')) == 0
    )
    assert "metrics.jsonl is not the file that" in out.read_text()
    assert [row["step"] for row in world.read_rows(run_dir)] == [5, 6]
    assert len(world.read_rows(run_dir, "completions.jsonl")) == 6 * 8


@pytest.mark.parametrize("truncate", [True, False])
def test_a_changed_log_stops_the_run_with_a_checkpoint(run_file, tmp_path, truncate):
    run_dir = tmp_path / "run"

    def alter():
        log = run_dir / "metrics.jsonl"
        os.truncate(log, 0) if truncate else log.open("ab").write(b"{}\n")

    code, output = run_with(run_file, run_dir, alter)
    assert code == 1
    assert "metrics.jsonl was removed, replaced or changed by another program" in output
    assert "checkpoint-4 was saved" in output


@pytest.mark.slow
def test_a_run_folder_that_is_lost_after_the_last_step_is_an_error(run_file, tmp_path):
    run_dir, moved = tmp_path / "run", tmp_path / "moved"

    def install():
        from toolkit.train.checkpointing.resumable_trainer import ResumableTrainer

        saved = ResumableTrainer.save_snapshot

        def then_moved(self, snapshot):
            saved(self, snapshot)
            if snapshot.hf_state.global_step == 6:
                run_dir.rename(moved)

        ResumableTrainer.save_snapshot = then_moved

    out = tmp_path / "out.txt"
    pid = world.fork_run(run_file, out, f'runtime.output_dir="{run_dir}"', before=install)
    assert world.wait_for_exit(pid) == 1
    assert f"is now {moved}; checkpoint-6 was saved" in out.read_text()
    assert not run_dir.exists()


def start(run_file, run_dir, *more, **options):
    """Start the installed command."""
    words = [world.BIN / "toolkit", "train", str(run_file), "--output-dir", str(run_dir), *more]
    return subprocess.Popen(words, env=world.command_environment(), **options)


def steps_done(run_dir):
    return len(world.raw_rows(run_dir))


@pytest.mark.parametrize(
    "last_read",
    [b"model", *(pytest.param(f"step {n}/6".encode(), marks=pytest.mark.slow) for n in (3, 6))],
)
def test_a_closed_output_pipe_does_not_stop_the_run(run_file, expected, tmp_path, last_read):
    """The pipe closes before step 1, after step 3, or after the last step, 6."""
    run_dir = tmp_path / "run"
    process = world.Command(run_file, "--output-dir", run_dir)
    read = b""
    while last_read not in read:
        read += os.read(process.out, 10)
    os.close(process.out)
    process.out = None
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == "warning: stdout is lost (Broken pipe); the run continues without it\n"
    assert world.result_digests(run_dir) == expected


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["full", "both gone", "both closed", "stderr gone"])
def test_streams_that_cannot_be_written_do_not_stop_the_run(run_file, expected, tmp_path, streams):
    run_dir = tmp_path / "run"
    words = f"{world.BIN}/toolkit train {run_file} --output-dir {run_dir}"
    redirected = {
        "full": f"{words} >{FULL} 2>{tmp_path}/err.txt",
        "both gone": f"({words}; echo $? >{tmp_path}/code) 2>&1 | true",
        "both closed": f"{words} >&- 2>&-",
        "stderr gone": f"{words} >{tmp_path}/out.txt 2>{FULL}",
    }[streams]
    shown = subprocess.run(
        ["bash", "-c", redirected], env=world.command_environment(), timeout=200, check=False
    )
    if streams == "both gone":
        world.wait_for(lambda: (tmp_path / "code").exists() and (tmp_path / "code").read_text())
        assert (tmp_path / "code").read_text() == "0\n"
    else:
        assert shown.returncode == 0
    if streams == "full":
        output = (tmp_path / "err.txt").read_text()
        assert (
            output
            == "warning: stdout is lost (No space left on device); the run continues without it\n"
        )
    assert world.result_digests(run_dir) == expected


@pytest.mark.slow
def test_an_error_keeps_its_exit_code_without_a_reader(tmp_path):
    words = f"{world.BIN}/toolkit train {tmp_path}/none.yaml"
    for streams in (f">{FULL} 2>{FULL}", ">&- 2>&-"):
        shown = subprocess.run(["bash", "-c", f"{words} {streams}"], check=False, timeout=60)
        assert shown.returncode == 2, streams


def assert_stopped(process, run_dir, name):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    latest = branch.valid_steps(run_dir)[0]
    assert f"stopped by {name}; checkpoint-{latest} was saved" in err
    assert err.count("error: ") == 1
    assert err.count("warning: ") <= 1  # about stdout, which is lost with the terminal
    assert "Traceback" not in err
    assert checkpoint.find_faults(run_dir / f"checkpoint-{latest}") == []
    assert not list(run_dir.glob(".checkpoint-*"))


def test_a_closed_terminal_stops_the_run_with_a_checkpoint(run_file, tmp_path):
    """When a terminal closes, the run gets SIGHUP and its stdout fails from then on."""
    run_dir = tmp_path / "run"
    process = world.Command(run_file, "--output-dir", run_dir)
    world.wait_for(lambda: steps_done(run_dir) >= 2)
    os.close(process.out)
    process.out = None
    process.send_signal(signal.SIGHUP)
    assert_stopped(process, run_dir, "SIGHUP")


@pytest.mark.slow
def test_a_run_with_nohup_continues_after_its_terminal_closed(run_file, expected, tmp_path):
    run_dir = tmp_path / "run"
    for more in ((), ("--nproc-per-node", "1")):
        shutil.rmtree(run_dir, ignore_errors=True)
        process = subprocess.Popen(
            ["nohup", world.BIN / "toolkit", "train", run_file, "--output-dir", run_dir, *more],
            env=world.command_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        world.wait_for(lambda: steps_done(run_dir) >= 2)
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert world.result_digests(run_dir) == expected


def slow_checkpoint():
    from toolkit.train.checkpointing import checkpoint

    commit = checkpoint.commit

    def slowly(partial, step):
        if step == 4:
            os.write(2, b"writing\n")
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                time.sleep(0.05)
        return commit(partial, step)

    checkpoint.commit = slowly


@pytest.mark.parametrize("signals", ["SIGINT", pytest.param("mixed", marks=pytest.mark.slow)])
def test_200_signals_while_a_checkpoint_is_written(run_file, expected, tmp_path, signals):
    run_dir = tmp_path / "run"
    process = world.Command(run_file, "--output-dir", run_dir, before=slow_checkpoint)
    assert os.read(process.err, 8) == b"writing\n"
    mixed = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
    for number in range(200):
        process.send_signal(signal.SIGINT if signals == "SIGINT" else mixed[number % 4])
        time.sleep(0.003)
    while process.poll() is None:  # until the process ends
        process.send_signal(signal.SIGINT if signals == "SIGINT" else signal.SIGTERM)
        time.sleep(0.01)
    assert_stopped(process, run_dir, "SIGINT" if signals == "SIGINT" else "SIGTERM")
    assert branch.valid_steps(run_dir)[0] == 4
    again = world.fork_run(run_file, tmp_path / "again.txt", f'runtime.output_dir="{run_dir}"')
    assert world.wait_for_exit(again) == 0
    assert world.result_digests(run_dir) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_several_ranks_without_a_reader_and_with_many_signals(run_file, tmp_path, number):
    run_dir = tmp_path / "run"
    half = ("--set", "grpo.per_device_train_batch_size=4", "--nproc-per-node", "2")
    process = start(
        run_file, run_dir, *half, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    world.wait_for(lambda: steps_done(run_dir) >= 2)
    process.send_signal(number)
    if number == signal.SIGHUP:
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.01)
    assert_stopped(process, run_dir, number.name)


@pytest.mark.slow
def test_a_run_folder_that_is_moved_during_a_run_with_several_ranks(run_file, tmp_path):
    import rank_world as ranks

    run_dir, moved = tmp_path / "run", tmp_path / "moved"

    def before(number):
        if number == 0:
            at_step(3, lambda: run_dir.rename(moved))()

    pids = ranks.start_ranks(run_file, run_dir, "grpo.per_device_train_batch_size=4", before=before)
    assert [world.wait_for_exit(pid) for pid in pids] == [1, 1], ranks.printed_by_ranks(run_dir)
    output = ranks.printed_by_ranks(run_dir)
    assert output.count("error: ") == 1, output
    assert f"is now {moved}; checkpoint-4 was saved" in output
    assert checkpoint.find_faults(moved / "checkpoint-4") == []
    assert {"rank-0.json", "rank-1.json"} <= {p.name for p in (moved / "checkpoint-4").iterdir()}
