"""While the collector is paused, Python does not collect by itself, and nothing is lost."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from toolkit.base.garbage_collection import collector_paused

if TYPE_CHECKING:
    from collections.abc import Iterator


class Node:
    """An object that references itself, so only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def collections_counted() -> Iterator[list[int]]:
    """A list of the generations that Python collects while the body runs."""
    generations: list[int] = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.callbacks.append(count)
    try:
        yield generations
    finally:
        gc.callbacks.remove(count)


def make_objects() -> list[list[int]]:
    """More objects than the thresholds of all generations allow without a collection."""
    first, second, third = gc.get_threshold()
    return [[] for _ in range(first * (second + 1) * (third + 1) + first)]


def test_python_does_not_collect_in_the_body_and_does_after_it() -> None:
    with collections_counted() as generations:
        with collector_paused():
            kept = make_objects()
            assert generations == []
        # The objects of the body are old now: no collection of young objects searches them.
        assert gc.get_count()[0] < len(kept)
        more = make_objects()
    assert generations
    assert len(more) == len(kept)


def test_the_objects_of_the_body_are_old_afterwards() -> None:
    with collector_paused():
        kept = Node()
    assert any(each is kept for each in gc.get_objects(generation=2))


def test_garbage_of_the_body_is_collected_later() -> None:
    with collector_paused():
        alive = weakref.ref(Node())
    assert alive() is not None
    gc.collect()
    assert alive() is None


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(ImportError), collector_paused():
        raise ImportError
    assert gc.isenabled()


def test_objects_that_another_module_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collector_paused():
            pass
        assert gc.get_freeze_count() == frozen > 0
    finally:
        gc.unfreeze()
