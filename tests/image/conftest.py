"""Real images, each built once from a clean store, with the scripts that users run."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from image_store import CONTAINERS, NEEDED, WORK, Store, still_copy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def base_options() -> tuple[str, ...]:
    """Build on the pinned bases where their registry is reached, else on stand-ins, and say so."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}; `just image-test` installs them")
    code = subprocess.run(
        [
            "skopeo",
            "inspect",
            "--raw",
            "--command-timeout",
            "20s",
            "docker://docker.io/library/python@" + pinned(),
        ],
        capture_output=True,
        timeout=60,
    ).returncode
    if code == 0:
        return ()
    print("NOTE: the registry of the pinned bases is not reached; building on stand-in bases")
    return ("--stand-in",)


def pinned() -> str:
    """The digest of the base of envcheck and train-cpu."""
    text = (CONTAINERS / "Dockerfile").read_text()
    return next(
        line.partition("@")[2]
        for line in text.splitlines()
        if line.startswith("ARG CPU_BASE_IMAGE")
    )


@pytest.fixture(scope="session")
def tree() -> Iterator[Path]:
    folder = still_copy(WORK / "test-tree")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def store(tree: Path) -> Iterator[Store]:
    """A store that is clean at the start. TOOLKIT_KEEP_STORE=1 keeps it from run to run."""
    found = Store(WORK / "test-store", tree)
    keep = os.environ.get("TOOLKIT_KEEP_STORE") == "1"
    if not keep:
        found.remove()
    yield found
    if not keep:
        found.remove()


# Built where they are not there yet: test_image_builds.py, which comes first, makes both twice.
@pytest.fixture(scope="session")
def envcheck_image(store: Store, base_options: tuple[str, ...]) -> str:
    return store.build("envcheck", *base_options)


@pytest.fixture(scope="session")
def train_cpu_image(store: Store, base_options: tuple[str, ...]) -> str:
    return store.build("train-cpu", *base_options)
