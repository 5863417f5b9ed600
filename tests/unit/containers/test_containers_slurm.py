"""The Slurm files, run by bash with fake commands instead of Slurm's commands and Apptainer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[3] / "containers/slurm"
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with fake commands. srun and apptainer run their arguments. apptainer and scontrol
    also write them to $LOG.

    Like the scontrol of Slurm 22.05, the fake one cannot change these settings of a running job and
    does not support `+=`.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    write(
        folder / "srun",
        'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"',
    )
    # The command follows the image. All arguments before the image are options of apptainer.
    write(
        folder / "apptainer",
        'echo "apptainer $*" >>"$LOG"\nwhile [ "$1" != image.sif ]; do shift; done\n'
        'shift\nexec "$@"',
    )
    write(
        folder / "scontrol",
        """echo "scontrol $*" >>"$LOG"
        case "$*" in
            "show job "*) echo "   ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)}" ;;
            show*) echo "$3" ;;
            *+=*) exit 1 ;;
            update*) grep -q "scontrol requeue" "$LOG" ;;
        esac""",
    )
    write(folder / "toolkit", 'exit "${CODE:-0}"')
    write(folder / "envcheck", 'exit "${VERDICT:-0}"')
    return folder


def environment(cluster: Path, **variables: str) -> dict[str, str]:
    return {
        "PATH": f"{cluster}:{SYSTEM}",
        "HOME": str(cluster.parent),
        "LOG": str(cluster.parent / "log"),
        "SIF": "image.sif",
        "CACHE": str(cluster.parent / "cache"),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURMD_NODENAME": "node1",
        **variables,
    }


def batch(cluster: Path, name: str, **variables: str) -> tuple[int, str, str]:
    """Run a batch script and return (exit code, content of $LOG, stderr)."""
    result = subprocess.run(
        ["bash", str(SLURM / name), "run.yaml"],
        env=environment(cluster, **variables),
        capture_output=True,
        text=True,
        timeout=30,
        cwd=cluster.parent,
    )
    log = cluster.parent / "log"
    return result.returncode, log.read_text() if log.exists() else "", result.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 5, 70])
def test_after_these_exit_codes_the_job_is_not_requeued(cluster: Path, code: int) -> None:
    exit_code, log, _ = batch(cluster, "train.sbatch", CODE=str(code))
    assert exit_code == code
    assert "scontrol" not in log


def test_a_run_that_stopped_with_a_checkpoint_is_requeued(cluster: Path) -> None:
    exit_code, log, _ = batch(cluster, "train.sbatch", CODE="75")
    assert exit_code == 75
    assert "scontrol requeue 41" in log


def test_the_requeued_job_excludes_a_bad_node(cluster: Path) -> None:
    _, log, _ = batch(cluster, "train.sbatch", CODE="3")
    assert log.index("scontrol requeue 41") < log.index(
        "scontrol update JobId=41 ExcNodeList=node1"
    )
    _, log, _ = batch(cluster, "train.sbatch", CODE="3", EXCLUDED="node[7-8]")
    assert "scontrol update JobId=41 ExcNodeList=node[7-8],node1\n" in log


def test_after_exit_code_4_the_job_is_requeued_with_a_later_start(cluster: Path) -> None:
    _, log, _ = batch(cluster, "train.sbatch", CODE="4")
    assert log.index("scontrol requeue 41") < log.index(
        "scontrol update JobId=41 StartTime=now+300"
    )


def test_the_number_of_requeues_is_limited(cluster: Path) -> None:
    _, log, stderr = batch(
        cluster, "train.sbatch", CODE="75", SLURM_RESTART_COUNT="3", MOST_RESTARTS="3"
    )
    assert "scontrol requeue" not in log
    assert "it is not requeued" in stderr


def started(cluster: Path, name: str) -> subprocess.Popen[bytes]:
    """Start the batch script ``name``, and return when its fake toolkit has created the file
    ``ready``.
    """
    process = subprocess.Popen(
        ["bash", str(SLURM / name), "run.yaml"],
        env=environment(cluster),
        stderr=subprocess.DEVNULL,
        cwd=cluster.parent,
    )
    until = time.monotonic() + 10
    while not (cluster.parent / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_signal_reaches_the_training_and_requeues(
    cluster: Path, number: signal.Signals
) -> None:
    write(
        cluster / "toolkit",
        f'trap "echo {number.name} >>$LOG; exit 75" {number.name[3:]}\n'
        "touch ready\nwhile :; do sleep 0.05; done",
    )
    process = started(cluster, "train.sbatch")
    # With `--signal=B:` and on a preemption, only the batch shell gets the signal.
    os.kill(process.pid, number)
    assert process.wait(timeout=10) == 75
    log = (cluster.parent / "log").read_text()
    assert number.name in log
    assert "scontrol requeue 41" in log


@pytest.mark.parametrize("name", ["train.sbatch", "train-multinode.sbatch"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_during_the_start_requeues_the_job(
    cluster: Path, number: signal.Signals, name: str
) -> None:
    write(cluster / "toolkit", "touch ready\nexec sleep 20")
    process = started(cluster, name)
    time.sleep(0.2)  # now `sleep` runs, which both signals end
    os.kill(process.pid, number)
    assert process.wait(timeout=10) == 128 + number
    assert "scontrol requeue 41" in (cluster.parent / "log").read_text()


def test_each_task_of_several_nodes_gets_its_rank(cluster: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE"
    write(
        cluster / "toolkit",
        f'for n in {names}; do echo "$n=${{!n}}" >>"$LOG"; done\necho "toolkit $*" >>"$LOG"',
    )
    exit_code, log, _ = batch(
        cluster,
        "train-multinode.sbatch",
        SLURM_PROCID="5",
        SLURM_LOCALID="1",
        SLURM_NTASKS="8",
    )
    assert exit_code == 0
    for line in ("RANK=5", "LOCAL_RANK=1", "WORLD_SIZE=8", "LOCAL_WORLD_SIZE=4"):
        assert line in log.splitlines()
    assert "toolkit train run.yaml" in log.splitlines()
    assert "MASTER_ADDR=node1,MASTER_PORT=29541" in log


def test_tasks_are_numbered_node_by_node(cluster: Path) -> None:
    """Processes that share a model have consecutive ranks, so such a group is on one node."""
    shift = 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"'
    write(cluster / "srun", f'echo "srun $*" >>"$LOG"\n{shift}')
    _, log, _ = batch(cluster, "train-multinode.sbatch")
    (started,) = [line for line in log.splitlines() if line.startswith("srun") and "--wait" in line]
    assert "--distribution=block" in started


def test_the_preflight_of_several_nodes_gets_the_number_of_processes(
    cluster: Path,
) -> None:
    """A generation batch can be divisible by the group size with 8 processes but not with one."""
    write(cluster / "envcheck", 'echo "checks for $WORLD_SIZE, $LOCAL_WORLD_SIZE here" >>"$LOG"')
    exit_code, log, _ = batch(cluster, "train-multinode.sbatch", SLURM_NTASKS="8")
    assert exit_code == 0
    assert "checks for 8, 4 here" in log.splitlines()


def test_a_run_on_several_nodes_that_stopped_with_a_checkpoint_is_requeued(cluster: Path) -> None:
    exit_code, log, _ = batch(cluster, "train-multinode.sbatch", CODE="75")
    assert exit_code == 75
    assert "scontrol requeue 41" in log


def test_a_bad_node_of_several_is_excluded_before_training_starts(cluster: Path) -> None:
    exit_code, log, _ = batch(cluster, "train-multinode.sbatch", VERDICT="3")
    assert exit_code == 3
    assert log.index("scontrol requeue 41") < log.index(
        "scontrol update JobId=41 ExcNodeList=node1"
    )
    assert "exec toolkit train" not in log


def test_a_mistake_in_the_run_file_ends_the_job_on_several_nodes(cluster: Path) -> None:
    exit_code, log, _ = batch(cluster, "train-multinode.sbatch", VERDICT="1")
    assert exit_code == 1
    assert "scontrol" not in log.replace("scontrol show", "")
    assert "exec toolkit train" not in log


def prolog(cluster: Path, **variables: str) -> tuple[int, str]:
    write(cluster / "logger", 'echo "$*" >>"$LOG"')
    result = subprocess.run(
        ["bash", str(SLURM / "prolog-check.sh")],
        env=environment(cluster, **variables),
        capture_output=True,
        text=True,
        timeout=30,
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize("verdict", [0, 1, 2, 4, 5, 70, 127])
def test_the_prolog_drains_a_node_only_after_exit_code_3(cluster: Path, verdict: int) -> None:
    write(cluster / "envcheck", f"exit {verdict}")
    assert prolog(cluster) == (0, "")


def test_the_prolog_drains_a_bad_node_and_says_why(cluster: Path) -> None:
    write(cluster / "envcheck", 'echo "GPU 0: row remap failed"\nexit 3')
    code, _ = prolog(cluster)
    assert code == 1
    assert "this node is bad: GPU 0: row remap failed" in (cluster.parent / "log").read_text()


def test_the_prolog_checks_the_node_without_variables_of_the_user(cluster: Path) -> None:
    # The check does not get $LOG, because the prolog removes the variables of the user.
    seen = cluster.parent / "seen"
    write(cluster / "envcheck", f'echo "$*" >{seen}\nenv >>{seen}')
    prolog(cluster, CUDA_VISIBLE_DEVICES="9", LD_PRELOAD="")
    text = seen.read_text()
    assert text.startswith("check --node\n")
    assert "CUDA_VISIBLE_DEVICES" not in text


def test_a_check_that_hangs_drains_no_node(cluster: Path) -> None:
    write(cluster / "envcheck", "exec sleep 20")
    started = time.monotonic()
    assert prolog(cluster, CHECK_SECONDS="1") == (0, "")
    assert time.monotonic() - started < 10


def test_a_node_without_envcheck_is_not_drained(cluster: Path) -> None:
    (cluster / "envcheck").unlink()
    assert prolog(cluster, SIF="")[0] == 0
