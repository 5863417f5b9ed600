"""Fixtures of the image tests: the images are built in a clean store with the scripts for users."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from image_store import CONTAINERS, NEEDED, WORK, Store, copy_working_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def base_options() -> tuple[str, ...]:
    """Build options: none if the registry of the pinned base images can be reached, otherwise
    ``--stand-in``.
    """
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
    """The pinned digest of the base image of envcheck and train-cpu."""
    text = (CONTAINERS / "Dockerfile").read_text()
    return next(
        line.partition("@")[2]
        for line in text.splitlines()
        if line.startswith("ARG CPU_BASE_IMAGE")
    )


@pytest.fixture(scope="session")
def tree() -> Iterator[Path]:
    folder = copy_working_tree(WORK / "test-tree")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def store(tree: Path) -> Iterator[Store]:
    """An image store that is empty at the start of the tests and removed at their end. With
    TOOLKIT_KEEP_STORE=1, it is kept.
    """
    found = Store(WORK / "test-store", tree)
    keep = os.environ.get("TOOLKIT_KEEP_STORE") == "1"
    if not keep:
        found.remove()
    yield found
    if not keep:
        found.remove()


# test_image_builds.py runs first and builds both images in this store. Then the build in these
# fixtures only reuses its layers.
@pytest.fixture(scope="session")
def envcheck_image(store: Store, base_options: tuple[str, ...]) -> str:
    return store.build("envcheck", *base_options)


@pytest.fixture(scope="session")
def train_cpu_image(store: Store, base_options: tuple[str, ...]) -> str:
    return store.build("train-cpu", *base_options)
