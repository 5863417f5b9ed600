"""Runs whose output folder is on a full or read-only file system, or with a file size limit."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess

import pytest
import train_world as world
from test_run_lost import at_step

from toolkit.train.checkpointing import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    run_file = world.make_run_files(tmp_path_factory.mktemp("w"), steps=6)
    assert (
        world.wait_for_exit(world.fork_run(run_file, run_file.parent / "out.txt", evaluate=True))
        == 0
    )
    return run_file, world.result_digests(run_file.parent / "run")


@pytest.fixture
def mount_small(tmp_path):
    """A function that mounts a tmpfs with the given options and returns its mount point."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()

    def mount(options):
        how = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount_point)]
        if subprocess.run(how, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system")
        return mount_point

    yield mount
    subprocess.run(["umount", "-l", str(mount_point)], capture_output=True, check=False)


def run_forked(run_file, run_dir, out, before=None):
    output_override = f'runtime.output_dir="{run_dir}"'
    code = world.wait_for_exit(
        world.fork_run(run_file, out, output_override, before=before, evaluate=True)
    )
    return code, out.read_text()


def error_lines(output):
    return sum(line.startswith("error: ") for line in output.splitlines())


def check_checkpoints(run_dir):
    """Check that all checkpoints are intact and that no partly written file remains."""
    assert list(run_dir.glob(".checkpoint-*")) == []
    assert all(checkpoint.find_faults(one) == [] for one in run_dir.glob("checkpoint-*"))
    assert not [one for one in run_dir.glob(".*.[0-9]*") if one.is_file()]


def test_a_file_system_that_is_too_small_is_an_error_before_the_run(
    undisturbed, mount_small, tmp_path
):
    run_file, _ = undisturbed
    run_dir = mount_small("size=64k") / "run"
    code, output = run_forked(run_file, run_dir, tmp_path / "out.txt")
    assert code == 1, output
    assert "check host.disk: output_dir" in output
    assert "64.0 KiB free" in output


@pytest.mark.parametrize("kib", [0, 4, 8, 16, 32, 64, 128, 256])
def test_a_full_file_system_keeps_the_last_checkpoint(undisturbed, mount_small, tmp_path, kib):
    """At step 3, the file system is resized so that only ``kib`` KiB are free."""
    run_file, expected = undisturbed
    run_dir = mount_small("size=64g") / "run"  # a tmpfs allocates memory only for written data

    def resize(size_bytes):
        how = ["mount", "-o", f"remount,size={size_bytes}", str(run_dir.parent)]
        subprocess.run(how, check=True)

    def fill():
        resize(shutil.disk_usage(run_dir).used + kib * 1024)

    code, output = run_forked(run_file, run_dir, tmp_path / "out.txt", before=at_step(3, fill))
    if code:
        assert code == 1, output
        assert error_lines(output) == 1, output
        assert "Traceback" not in output
        assert "the disk is full (No space left on device)" in output
        assert "checkpoint-2" in {one.name for one in run_dir.glob("checkpoint-*")}
        check_checkpoints(run_dir)
    resize("64g")
    code, output = run_forked(run_file, run_dir, tmp_path / "again.txt")
    assert code == 0, output
    assert world.result_digests(run_dir) == expected
    check_checkpoints(run_dir)


def test_a_read_only_file_system_is_an_error(undisturbed, mount_small, tmp_path):
    run_file, _ = undisturbed
    run_dir = mount_small("ro") / "run"
    code, output = run_forked(run_file, run_dir, tmp_path / "out.txt")
    assert code == 1, output
    assert "the output folder cannot be written: Read-only file system" in output
    assert "another runtime.output_dir" in output


@pytest.mark.parametrize("limit", [2000, 20_000])
def test_a_file_size_limit_keeps_the_last_checkpoint(undisturbed, tmp_path, limit):
    """The process has a file size limit (``ulimit -f``) from step 3 on."""
    run_file, expected = undisturbed
    run_dir = tmp_path / "run"

    def lower():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, output = run_forked(run_file, run_dir, tmp_path / "out.txt", before=at_step(3, lower))
    assert code == 1, output
    assert error_lines(output) == 1, output
    assert "would be larger than the limit of this process" in output
    assert "(File too large)" in output
    assert "ulimit -f" in output
    assert "Traceback" not in output
    check_checkpoints(run_dir)
    code, output = run_forked(run_file, run_dir, tmp_path / "again.txt")
    assert code == 0, output
    assert world.result_digests(run_dir) == expected
    shutil.rmtree(run_dir)
