"""Each fault that stops a build or the start of a container has its own message and exit code."""

from __future__ import annotations

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from image_store import REPO, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.image
NOWHERE = "sha256:" + "0" * 64


class Registry(BaseHTTPRequestHandler):
    """A registry that answers and contains no image."""

    def do_GET(self) -> None:
        known = self.path == "/v2/"
        body = (
            b"{}"
            if known
            else b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
        )
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address of the registry, home folder with settings that allow plain HTTP to this address)"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    address = f"127.0.0.1:{server.server_port}"
    settings = tmp_path / ".config/containers/registries.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield address, tmp_path
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_digest_that_the_registry_does_not_have_is_an_error(
    store: Store, registry: tuple[str, Path]
) -> None:
    address, home = registry
    code, output = store.script(
        "build",
        *("envcheck", "--engine", "buildah"),
        CPU_BASE_IMAGE=f"{address}/library/python:3.11@{NOWHERE}",
        HOME=str(home),
    )
    assert code == 1, output
    assert "the registry has no image" in output
    assert "correct the digest" in output


def test_an_unreachable_registry_is_an_error(store: Store) -> None:
    code, output = store.script(
        "build",
        *("envcheck", "--engine", "buildah"),
        CPU_BASE_IMAGE=f"127.0.0.1:9/library/python@{NOWHERE}",
    )
    assert code == 4, output
    assert "cannot be reached" in output
    assert "--stand-in" in output


def test_a_base_without_a_digest_is_an_error(store: Store) -> None:
    code, output = store.script(
        "build",
        "envcheck",
        "--engine",
        "buildah",
        CPU_BASE_IMAGE="docker.io/library/python:3.11",
    )
    assert code == 1, output
    assert "is not pinned by digest" in output


def test_a_base_that_is_missing_in_the_local_store_is_an_error(store: Store) -> None:
    code, output = store.script(
        "build",
        *("envcheck", "--engine", "buildah"),
        CPU_BASE_IMAGE=f"localhost/base@{NOWHERE}",
    )
    assert code == 1, output
    assert "is not in the local store" in output


def test_a_target_that_does_not_exist_is_an_error(store: Store) -> None:
    code, output = store.script("build", "training")
    assert code == 2, output
    assert "invalid choice: 'training'" in output


def copy_of_the_project(folder: Path) -> Path:
    for name in ("toolkit", "schemas", "locks", "containers"):
        shutil.copytree(REPO / name, folder / name)
    for name in ("pyproject.toml", "uv.lock", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    (folder / ".venv").symlink_to(REPO / ".venv")
    return folder


def test_a_lock_that_does_not_match_pyproject_stops_the_script(
    store: Store, tmp_path: Path
) -> None:
    project = copy_of_the_project(tmp_path)
    text = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(text.replace('"click>=8.2"', '"click>=99"'))
    code, output = store.script("build", "envcheck", "--stand-in", project=project)
    assert code == 1, output
    assert "uv.lock does not match pyproject.toml" in output


def test_a_lock_that_does_not_match_pyproject_stops_a_plain_build(
    store: Store, envcheck_image: str, base_options: tuple[str, ...], tmp_path: Path
) -> None:
    """A plain `docker build` does not run containers/lock.sh, so the last step of the Dockerfile
    must report the mismatch. The test replaces lock.sh with a script that does nothing.
    """
    project = copy_of_the_project(tmp_path)
    text = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(text.replace('"click>=8.2"', '"click>=99"'))
    (project / "containers/lock.sh").write_text("#!/bin/sh\nexit 0\n")
    code, output = store.script(
        "build",
        *("envcheck", "--engine", "buildah", "--tag", "localhost/toolkit:spoiled", *base_options),
        project=project,
        TOOLKIT_SETUP=str(REPO / ".setup/containers"),
    )
    assert code == 1, output
    assert "the lock does not match pyproject.toml" in output
    assert "requires click>=99, but the lock has click==" in output


def test_a_cache_that_cannot_be_written_is_reported(store: Store, envcheck_image: str) -> None:
    options = ("--tmpfs", "/cache:rw,mode=1777", "--env", "TOOLKIT_CACHE=/usr/share/toolkit")
    result = store.run(envcheck_image, "54321:54321", "envcheck", "check", options=options)
    assert result.returncode == 1
    assert "TOOLKIT_CACHE=/usr/share/toolkit cannot be written by uid 54321" in result.stderr


DRIVER = r"""
#include <string.h>
/* A fake driver with CARDS cards and the functions that the pre-flight calls. 0 is success. */
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int f) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int r) { return r ? "Not Supported" : "Success"; }
int nvmlSystemGetDriverVersion(char *v, unsigned int n) { strncpy(v, DRIVER, n); return 0; }
int nvmlSystemGetNVMLVersion(char *v, unsigned int n) { strncpy(v, "11." DRIVER, n); return 0; }
int nvmlSystemGetCudaDriverVersion(int *v) { *v = CUDA; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = CUDA; return 0; }
int nvmlDeviceGetCount_v2(unsigned int *n) { *n = CARDS; return 0; }
static int card[CARDS];
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, void **d) { *d = &card[i]; return 0; }
int nvmlDeviceGetName(void *d, char *v, unsigned int n)
{ strncpy(v, "NVIDIA GeForce RTX 3090", n); return 0; }
int nvmlDeviceGetUUID(void *d, char *v, unsigned int n)
{ strncpy(v, "GPU-00000000-0000-0000-0000-000000000001", n); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *d, int *a, int *b) { *a = 8; *b = 6; return 0; }
"""


def fake_driver_options(folder: Path, driver: str, cuda: int, cards: int) -> tuple[str, ...]:
    """Options that mount a fake libnvidia-ml into the container, as the NVIDIA runtime does."""
    (folder / "nvml.c").write_text(DRIVER)
    library = folder / "libnvidia-ml.so.1"
    defined = (f'-DDRIVER="{driver}"', f"-DCUDA={cuda}", f"-DCARDS={cards}")
    compiler = ["gcc", "-shared", "-fPIC", *defined, "-o", str(library), str(folder / "nvml.c")]
    subprocess.run(compiler, check=True)
    return ("--volume", f"{library}:/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1:ro")


def test_a_driver_that_is_too_old_is_reported(
    store: Store, envcheck_image: str, tmp_path: Path
) -> None:
    driver = fake_driver_options(tmp_path, "470.57.02", 11040, 1)
    result = store.run(
        envcheck_image,
        *("1000:1000", "envcheck", "check", "--require", "driver>=580"),
        options=("--tmpfs", "/cache:rw,mode=1777", *driver),
    )
    assert result.returncode == 3, result.stdout + result.stderr
    assert "driver 470.57.02 is older than the required 580" in result.stdout
    assert "use a node with a newer driver" in result.stdout


RUN_FILE = """\
model: {model_name: /absent}
dataset: {path: train.jsonl, prompt: question, answer: answer}
reward: {functions: [{name: numeric_match}]}
"""


def test_64_mb_of_shared_memory_are_reported(
    store: Store, envcheck_image: str, tmp_path: Path
) -> None:
    """64 MB is Docker's default. It stops a job on two cards. A job on one card needs no shared
    memory.
    """
    tmp_path.chmod(0o755)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    rows = (f'{{"question": "1+{n}?", "answer": "{n + 1}"}}\n' for n in range(64))
    (tmp_path / "train.jsonl").write_text("".join(rows))
    options = (
        *("--tmpfs", "/cache:rw,mode=1777", "--volume", f"{tmp_path}:/work:ro"),
        *fake_driver_options(tmp_path, "580.65.06", 13000, 2),
    )
    check = ("envcheck", "check", "--config", "/work/run.yaml", "--only", "host.shm")
    two_ranks = ("--env", "WORLD_SIZE=2", "--env", "LOCAL_WORLD_SIZE=2")

    several = store.run(
        envcheck_image, "1000:1000", *check, options=(*options, *two_ranks, "--shm-size", "64m")
    )
    assert several.returncode == 1, several.stdout + several.stderr
    output = " ".join(several.stdout.split())
    assert "host.shm" in output
    assert "64.0 MiB free of 64.0 MiB; the processes of a job on 2 cards need" in output
    assert "--shm-size 8g" in output

    enough = store.run(
        envcheck_image, "1000:1000", *check, options=(*options, *two_ranks, "--shm-size", "8g")
    )
    assert enough.returncode == 0, enough.stdout + enough.stderr
    alone = store.run(envcheck_image, "1000:1000", *check, options=(*options, "--shm-size", "64m"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "1 check: 1 ok" in alone.stdout
