"""Two builds from clean stores give one image, to the byte; it has what its Dockerfile says.

This file comes first by its name: what it builds in the common store the others use.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from image_store import WORK, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.image, pytest.mark.slow]
TARGETS = ("envcheck", "train-cpu")


@pytest.fixture(scope="module")
def digests(
    store: Store, tree: Path, base_options: tuple[str, ...]
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """The digests of every target in two stores that hold nothing but a base.

    Both are built at once: a build keeps one core busy, and the disk when that core waits.
    """
    second = Store(WORK / "second-store", tree)
    second.remove()

    def build(where: Store) -> dict[str, str]:
        return {target: where.digest(where.build(target, *base_options)) for target in TARGETS}

    try:
        if base_options:
            # One after the other: the first makes the archive that both take their base from.
            for where in (store, second):
                code, output = where.stand_in("bookworm")
                assert code == 0, output
        with ThreadPoolExecutor(2) as pool:
            first, other = pool.map(build, (store, second))
        yield first, other
    finally:
        second.remove()


@pytest.mark.parametrize("target", TARGETS)
def test_two_builds_from_clean_stores_have_the_same_digest(
    digests: tuple[dict[str, str], dict[str, str]], target: str
) -> None:
    first, second = digests
    assert first[target].startswith("sha256:")
    assert first[target] == second[target]
