"""Rows are distributed over packs by their lengths, or evenly over a requested number of packs."""

from __future__ import annotations

import random

import pytest

from toolkit.train.step.packing import Row, count_pack_tokens, even_packs, split_rows


def make_rows(seed: int, groups: int = 5, group_size: int = 4, max_length: int = 60) -> list[Row]:
    rng = random.Random(seed)
    prompts = [tuple(range(number, number + rng.randint(1, 20))) for number in range(groups)]
    rows = [
        (prompt, rng.choice([0, 1, rng.randint(1, max_length)])) for prompt in prompts * group_size
    ]
    rng.shuffle(rows)
    return [Row(number, prompt, length) for number, (prompt, length) in enumerate(rows)]


@pytest.mark.parametrize("seed", range(20))
def test_packs_have_every_row_once_and_respect_the_limit(seed: int) -> None:
    rows, limit = make_rows(seed), 100
    packs = split_rows(rows, limit)
    assert sorted(row for pack in packs for row in pack) == rows
    assert all(count_pack_tokens(pack) <= limit for pack in packs)
    min_packs = -(-count_pack_tokens(rows) // limit)
    assert min_packs <= len(packs) <= 2 * min_packs + 1
    assert packs == split_rows(list(rows), limit)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("number", [1, 2, 7, 20, 30])
def test_even_packs_returns_the_requested_number(seed: int, number: int) -> None:
    rows = make_rows(seed)
    packs = even_packs(rows, number)
    assert len(packs) == number
    assert sorted(row for pack in packs for row in pack) == rows


def test_a_group_stays_in_one_pack_if_it_fits() -> None:
    first, second = (1, 2, 3), (4, 5, 6)
    rows = [Row(n, first if n % 2 else second, 10) for n in range(8)]
    packs = split_rows(rows, 45)
    assert [{row.prompt for row in pack} for pack in packs] == [{second}, {first}]
    # A pack has four rows of ten tokens, and the two tokens of the prompt before its last token.
    assert [count_pack_tokens(pack) for pack in packs] == [42, 42]


def test_a_row_that_is_too_long_is_a_pack_of_its_own() -> None:
    rows = [Row(0, (1, 2), 500), Row(1, (1, 2), 5), Row(2, (3, 4), 5)]
    packs = split_rows(rows, 100)
    assert [0] in [[row.number for row in pack] for pack in packs]
