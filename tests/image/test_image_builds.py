"""Two builds from clean stores give images with the same digest.

Because of its name, pytest runs this file first. The other files use the images that it builds in
the common store.
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
    """The digests of every target in two stores that contain only a base image.

    The two stores are built in parallel, because one build uses only one core.
    """
    second = Store(WORK / "second-store", tree)
    second.remove()

    def build(where: Store) -> dict[str, str]:
        return {target: where.digest(where.build(target, *base_options)) for target in TARGETS}

    try:
        if base_options:
            # In sequence: the first call makes the archive from which both stores get the base.
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
