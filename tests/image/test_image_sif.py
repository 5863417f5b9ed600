"""SIF images that the real Apptainer builds and runs as an unprivileged user."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from image_store import CONTAINERS, REPO, WORK, Store, wait_for_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.image, pytest.mark.slow]
USER = 1000


def command(*arguments: str) -> list[str]:
    return ["bash", str(CONTAINERS / "apptainer.sh"), *arguments]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def apptainer(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=REPO,
    )


@pytest.fixture(scope="module")
def sif(store: Store, train_cpu_image: str) -> Iterator[Path]:
    assert train_cpu_image == "localhost/toolkit:train-cpu"
    output = WORK / "test.sif"
    code, text = store.script("sif", "train-cpu", "--from-image", "--output", str(output))
    assert code == 0, text
    print(text)
    yield output
    output.unlink()


def folder_of_the_user(name: str) -> Path:
    path = WORK / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    os.chown(path, USER, USER)
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that belongs to the unprivileged user."""
    path = folder_of_the_user("test-sif")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    """The folder in which the demo runs."""
    path = folder_of_the_user("test-sif-demo")
    yield path
    shutil.rmtree(path)


def contained_run_arguments(world: Path, sif: Path, *arguments: str) -> tuple[str, ...]:
    """The arguments of `apptainer run` in which ``world`` is the only folder of the host."""
    return (
        *("run", "--contain", "--no-home", "--bind", f"{world}:/work", "--pwd", "/work"),
        *("--env", "TOOLKIT_CACHE=/work/cache,TMPDIR=/work", str(sif), *arguments),
    )


@pytest.fixture(scope="module")
def demo_results(sif: Path, world: Path) -> tuple[subprocess.CompletedProcess[str], ...]:
    """The results of `apptainer test` and of the demo. Both run a whole demo on one thread, so they
    run in parallel.
    """
    script = "touch /opt/toolkit/x 2>&1; toolkit demo --out /work/demo"
    asked = (("test", str(sif)), contained_run_arguments(world, sif, "sh", "-c", script))
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(lambda arguments: apptainer(*arguments), asked))


def test_apptainer_test_passes(demo_results: tuple[subprocess.CompletedProcess[str], ...]) -> None:
    """The section %test starts envcheck, reads the manifest, runs the pre-flight and the demo."""
    result = demo_results[0]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "image train-cpu" in result.stdout
    assert "pre-flight: exit code 0" in result.stdout
    assert "exact match 0." in result.stdout


def test_an_ordinary_user_runs_the_demo_in_a_read_only_container(
    demo_results: tuple[subprocess.CompletedProcess[str], ...], world: Path
) -> None:
    result = demo_results[1]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Read-only file system" in result.stdout
    assert "exact match 0." in result.stdout
    assert (world / "demo/run/adapter/adapter_model.safetensors").is_file()
    assert {path.lstat().st_uid for path in world.rglob("*")} == {USER}


def test_sigterm_to_the_sif_writes_a_checkpoint_and_exits_with_75(
    demo_results: tuple[subprocess.CompletedProcess[str], ...], sif: Path, world: Path
) -> None:
    assert demo_results[1].returncode == 0
    train = ("toolkit", "train", "/work/demo/run.yaml", "--max-steps", "5000")
    run = contained_run_arguments(world, sif, *train, "--output-dir", "/work/stopped")
    log = WORK / "sigterm-sif.log"
    with (
        log.open("w") as written,
        subprocess.Popen(
            command(*run),
            env=environment(),
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=REPO,
        ) as process,
    ):
        wait_for_steps(process, world / "stopped/metrics.jsonl", log)
        asked = time.monotonic()
        process.terminate()
        assert process.wait(timeout=60) == 75, log.read_text()
        assert time.monotonic() - asked < 30
    assert list((world / "stopped").glob("checkpoint-*"))
    log.unlink()


def test_variables_of_the_host_take_precedence(sif: Path) -> None:
    result = apptainer("run", str(sif), "env", HF_HOME="/tmp/models", APPTAINERENV_X="1")
    assert result.returncode == 0, result.stderr
    assert "HF_HOME=/tmp/models" in result.stdout.splitlines()
    assert "PYTHONNOUSERSITE=1" in result.stdout.splitlines()


def test_the_sif_exits_with_the_code_of_the_preflight(sif: Path, folder: Path) -> None:
    result = apptainer("run", "--bind", str(folder), str(sif), "toolkit", "train", "absent.yaml")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "not started" in result.stderr


def test_labels_and_help_come_from_the_definition(sif: Path) -> None:
    labels = apptainer("inspect", "--labels", str(sif)).stdout
    assert "org.opencontainers.image.title: toolkit train-cpu" in labels
    assert "apptainer run --nv" in apptainer("run-help", str(sif)).stdout


def test_a_misspelt_section_is_an_error(tmp_path: Path) -> None:
    """Apptainer itself checks the syntax of the definition."""
    spoiled = tmp_path / "toolkit.def"
    text = (CONTAINERS / "toolkit.def").read_text()
    spoiled.write_text(text.replace("%runscript", "%runscipt"))
    result = apptainer("build", str(tmp_path / "x.sif"), str(spoiled), TOOLKIT_APPTAINER_USER="0")
    assert result.returncode != 0
    assert "runscipt" in result.stdout + result.stderr


def test_a_sif_also_builds_straight_from_the_image(
    store: Store, envcheck_image: str, folder: Path
) -> None:
    """Apptainer builds a SIF from the OCI archive without a definition."""
    store.buildah("push", "--quiet", envcheck_image, f"oci-archive:{folder}/image.tar")
    output = folder / "plain.sif"
    (folder / "image.tar").chmod(0o644)
    built = apptainer("build", str(output), f"oci-archive:{folder}/image.tar")
    assert built.returncode == 0, built.stderr
    result = apptainer("run", str(output), "envcheck", "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("envcheck, version")


def test_the_definition_also_builds_from_a_base(
    store: Store, base_options: tuple[str, ...], folder: Path
) -> None:
    """Without an image of the toolkit, the section %post installs the packages of the lock."""
    output = folder / "base.sif"
    code, text = store.script(
        "sif", "envcheck", "--from-base", "--output", str(output), *base_options
    )
    assert code == 0, text
    result = apptainer("run", str(output), "envcheck", "check")
    assert result.returncode == 0, result.stdout + result.stderr
    listing = apptainer("exec", str(output), "ls", "-A", "/run/secrets", "/tmp/pip", "/build")
    assert listing.stdout == ""
