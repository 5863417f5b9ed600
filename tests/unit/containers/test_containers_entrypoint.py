"""The entry point, run by `sh`, with fake commands in the place of those that it calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
ENTRYPOINT = REPO / "containers/entrypoint.sh"
SYSTEM = "/usr/local/bin:/usr/bin:/bin"
# A folder in which not even root can create a file.
UNWRITABLE = "/proc/self/fdinfo"


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with fake commands. They print their arguments. envcheck exits with $VERDICT, and
    toolkit with $CODE.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    write(folder / "envcheck", 'echo "envcheck $*"\nexit "${VERDICT:-0}"')
    write(folder / "toolkit", 'echo "toolkit $*"\nexit "${CODE:-0}"')
    return folder


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def call(commands: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{commands}:{SYSTEM}",
        "TOOLKIT_CACHE": str(commands.parent / "cache"),
        **variables,
    }
    environment = {name: value for name, value in environment.items() if value}
    return subprocess.run(
        ["sh", str(ENTRYPOINT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=commands.parent,
    )


def test_training_starts_if_the_preflight_passes(commands: Path) -> None:
    result = call(commands, "toolkit", "train", "run.yaml", "--set", "x=1")
    assert result.returncode == 0
    assert result.stdout == "toolkit train run.yaml --set x=1\n", (
        "stdout has more than the command's text"
    )
    assert "envcheck check --config run.yaml" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "checked_arguments"),
    [
        (["run.yaml", "--output-dir", "/out"], "run.yaml --set runtime.output_dir=/out"),
        (["--output-dir=/a b", "run.yaml"], "run.yaml --set runtime.output_dir=/a b"),
        (
            ["--set", "lora.r=8", "run.toml", "--set=grpo.seed=1"],
            "run.toml --set lora.r=8 --set=grpo.seed=1",
        ),
        (["--resume", "old.yaml", "--max-steps", "3", "--evaluate", "run"], "run"),
    ],
)
def test_the_preflight_checks_the_run_file_with_the_options(
    commands: Path, arguments: list[str], checked_arguments: str
) -> None:
    result = call(commands, "toolkit", "train", *arguments)
    assert result.stdout == f"toolkit train {' '.join(arguments)}\n"
    assert f"envcheck check --config {checked_arguments}\n" in result.stderr


@pytest.mark.parametrize("option", [["--nproc-per-node", "4"], ["--nproc-per-node=4"]])
def test_the_preflight_gets_the_number_of_processes(commands: Path, option: list[str]) -> None:
    write(commands / "envcheck", 'echo "$* for $WORLD_SIZE"')
    write(commands / "toolkit", 'echo "toolkit $*, ${WORLD_SIZE:-no} world yet"')
    result = call(commands, "toolkit", "train", *option, "run.yaml")
    assert "check --config run.yaml for 4\n" in result.stderr
    assert result.stdout == f"toolkit train {' '.join(option)} run.yaml, no world yet\n"


@pytest.mark.parametrize("option", [["--nproc-per-node", "auto"], ["--nproc-per-node=auto"]])
def test_the_preflight_assumes_one_process_if_the_number_is_auto(
    commands: Path, option: list[str]
) -> None:
    write(commands / "envcheck", 'echo "$* for ${WORLD_SIZE:-one}"')
    result = call(commands, "toolkit", "train", *option, "run.yaml")
    assert "check --config run.yaml for one\n" in result.stderr


@pytest.mark.parametrize("verdict", ["1", "2", "3", "4", "5", "70"])
def test_the_code_of_the_preflight_is_passed_on(commands: Path, verdict: str) -> None:
    result = call(commands, "toolkit", "train", "run.yaml", VERDICT=verdict)
    assert result.returncode == int(verdict)
    assert "toolkit train" not in result.stdout, "the training must not have started"
    assert f"exit code {verdict}" in result.stderr


@pytest.mark.parametrize(("mode", "is_checked"), [("warn", True), ("skip", False)])
def test_the_preflight_can_be_a_warning_or_be_skipped(
    commands: Path, mode: str, is_checked: bool
) -> None:
    result = call(commands, "toolkit", "train", "run.yaml", VERDICT="3", TOOLKIT_PREFLIGHT=mode)
    assert result.returncode == 0
    assert result.stdout == "toolkit train run.yaml\n"
    assert ("envcheck check" in result.stderr) is is_checked


def test_an_unknown_mode_is_a_usage_error(commands: Path) -> None:
    result = call(commands, "toolkit", "train", "run.yaml", TOOLKIT_PREFLIGHT="maybe")
    assert result.returncode == 2
    assert "check, warn or skip" in result.stderr


def test_other_commands_have_no_preflight_and_keep_their_code(commands: Path) -> None:
    result = call(commands, "toolkit", "demo", "--out", "x.yaml", CODE="75", VERDICT="3")
    assert result.returncode == 75
    assert "envcheck" not in result.stderr


def test_without_a_command_the_node_is_checked(commands: Path) -> None:
    assert call(commands).stdout == "envcheck check\n"


def environment_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert result.returncode == 0, result.stderr
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)


def test_a_caller_without_a_home_gets_a_home_and_a_name(commands: Path, tmp_path: Path) -> None:
    seen = environment_of(call(commands, "env", HOME="/"))
    assert seen["HOME"] == str(tmp_path / "cache")
    assert seen["USER"] == seen["LOGNAME"] != ""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_HOME"):
        assert seen[name].startswith(str(tmp_path / "cache")), name
    assert f"-{os.getuid()}/" in seen["TRITON_CACHE_DIR"], "the folder name has no uid"


def test_caches_are_in_the_usual_folders_of_a_writable_home(commands: Path, tmp_path: Path) -> None:
    if os.path.isdir("/cache"):
        pytest.skip("this machine has a /cache, which comes before a home folder")
    home = tmp_path / "home"
    home.mkdir()
    seen = environment_of(call(commands, "env", HOME=str(home), TOOLKIT_CACHE=""))
    assert seen["XDG_CACHE_HOME"] == f"{home}/.cache"
    assert seen["HF_HOME"] == f"{home}/.cache/huggingface"


def test_variables_of_the_caller_are_kept(commands: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    seen = environment_of(call(commands, "env", HOME=str(home), HF_HOME="/models", USER="ada"))
    assert (seen["HOME"], seen["HF_HOME"], seen["USER"]) == (str(home), "/models", "ada")


def test_a_cache_that_is_not_writable_is_reported(commands: Path) -> None:
    result = call(commands, "env", TOOLKIT_CACHE=UNWRITABLE)
    assert result.returncode == 1
    assert f"TOOLKIT_CACHE={UNWRITABLE} cannot be written by uid" in result.stderr
    assert "fix:" in result.stderr


def test_only_a_tmpdir_that_is_not_writable_is_replaced(commands: Path, tmp_path: Path) -> None:
    seen = environment_of(call(commands, "env", TMPDIR=UNWRITABLE))
    assert seen["TMPDIR"] == str(tmp_path / "cache")
    assert environment_of(call(commands, "env", TMPDIR=str(tmp_path)))["TMPDIR"] == str(tmp_path)


def test_the_entry_point_leaves_no_file_in_the_cache(commands: Path, tmp_path: Path) -> None:
    call(commands, "true")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_compatibility_libraries_are_an_error(commands: Path) -> None:
    result = call(
        commands, "true", TOOLKIT_CUDA_COMPAT="1", TOOLKIT_COMPAT_DIR=str(commands / "none")
    )
    assert result.returncode == 1
    assert "no compatibility libraries" in result.stderr


def test_compatibility_libraries_without_a_driver_are_reported(
    commands: Path, tmp_path: Path
) -> None:
    (tmp_path / "libcuda.so.580.82.07").touch()
    result = call(
        commands,
        "true",
        TOOLKIT_CUDA_COMPAT="1",
        TOOLKIT_COMPAT_DIR=str(tmp_path),
        TOOLKIT_PROC_DRIVER=str(tmp_path / "absent"),
    )
    assert result.returncode == 3
    assert "version of the driver cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("driver", "used"),
    [("535.183.01", True), ("580.95.05", False), ("590.10", False)],
)
def test_compatibility_libraries_are_used_only_with_an_older_driver(
    commands: Path, tmp_path: Path, driver: str, used: bool
) -> None:
    compat = tmp_path / "compat"
    compat.mkdir()
    (compat / "libcuda.so.580.82.07").touch()
    version = tmp_path / "version"
    version.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sun Jul 27\n")
    result = call(
        commands,
        "env",
        TOOLKIT_CUDA_COMPAT="1",
        TOOLKIT_PROC_DRIVER=str(version),
        TOOLKIT_COMPAT_DIR=str(compat),
    )
    assert environment_of(result).get("LD_LIBRARY_PATH") == (str(compat) if used else None)
    assert ("older" if used else "not applied") in result.stderr


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("100000 100000", "1"), ("50000 100000", "1"), ("max 100000", None), ("6400000 100000", None)],
)
def test_the_thread_count_follows_the_cpu_limit_of_the_container(
    commands: Path, tmp_path: Path, limit: str, threads: str | None
) -> None:
    assert (os.cpu_count() or 1) >= 2, "this test needs at least two CPUs"
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    seen = environment_of(call(commands, "env", TOOLKIT_CPU_MAX=str(tmp_path / "cpu.max")))
    assert seen.get("OMP_NUM_THREADS") == threads


def test_the_thread_count_of_the_caller_is_kept(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    seen = environment_of(
        call(commands, "env", TOOLKIT_CPU_MAX=str(tmp_path / "cpu.max"), OMP_NUM_THREADS="7")
    )
    assert seen["OMP_NUM_THREADS"] == "7"


def test_a_signal_reaches_the_command_itself(commands: Path) -> None:
    write(
        commands / "trainer",
        'trap "echo stopping; exit 75" TERM\necho ready\nwhile :; do sleep 0.05; done',
    )
    process = subprocess.Popen(
        ["sh", str(ENTRYPOINT), "trainer"],
        env={"PATH": f"{commands}:{SYSTEM}", "TOOLKIT_CACHE": str(commands.parent / "cache")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    sent_at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=10)
    assert (process.returncode, rest) == (75, "stopping\n")
    assert time.monotonic() - sent_at < 5
