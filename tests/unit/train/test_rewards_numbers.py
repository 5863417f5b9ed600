"""Parsing of numbers in the forms that people and models write."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.train.rewards.number_parsing import (
    Number,
    answer_in,
    is_same_number,
    last_boxed,
    numbers_in,
    to_number,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"),
        ("the answer is 18 eggs, so $18.", "18"),
        ("-1,234.50", "-1234.5"),
        ("1,000,000 dollars", "1000000"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("5km/h", "5"),
        ("3/4", "3/4"),
        ("3 / 4 of it", "3/4"),
        ("1 3/4 cups", "7/4"),
        ("-1 3/4", "-7/4"),
        (".5", "1/2"),
        ("1.2e3", "1200"),
        ("1e5.", "100000"),
        ("1.2 x 10^3", "1200"),
        (r"1.2 \times 10^{-3}", "3/2500"),
        ("7-5", "5"),
        ("7 - 5", "5"),
        ("is \u22125", "-5"),
        ("(-3)", "-3"),
        ("+8", "8"),
        ("12:30", "30"),
        ("3,5", "5"),
        ("1{,}234", "1234"),
        ("1\u202f234 kg", "1234"),
        (r"\boxed{\frac{3}{4}} or 9", "3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"2\frac12", "5/2"),
        ("#### 42\nand 7", "42"),
        ("1 #### 2 #### 3 then 4", "3"),
        ("#### none, 5", "5"),
    ],
)
def test_the_answer_of_a_text(text: str, value: str) -> None:
    assert answer_in(text) == Number(Fraction(value))


@pytest.mark.parametrize(
    "text",
    ["", "no number", "H2O", "v1.2.3", "3/0", "1e999999999", "9" * 5000, "<think>", "a.5", "####"],
)
def test_texts_without_an_answer(text: str) -> None:
    assert answer_in(text) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (18, 18),
        (0.25, Fraction(1, 4)),
        ("She has 3. #### 18", 18),
        (1e-7, Fraction(1, 10**7)),
        (None, None),
        (True, None),
        (float("nan"), None),
    ],
)
def test_an_answer_of_a_dataset(value: object, expected: object) -> None:
    number = to_number(value)
    assert (number.value if number else None) == expected


@pytest.mark.parametrize(
    ("guess", "gold", "equal"),
    [
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "50 percent", True),
        ("0.5", "50", False),
        ("0.5%", "50%", False),
        ("0.30", "3/10", True),
        ("0.1", "0.10000000000000001", True),
        ("0.333", "1/3", False),
        ("1000000000001", "1000000000000", False),
    ],
)
def test_equality(guess: str, gold: str, equal: bool) -> None:
    left, right = answer_in(guess), answer_in(gold)
    assert left is not None
    assert right is not None
    assert is_same_number(left, right) is equal


def test_tolerance_is_relative_to_the_gold_value() -> None:
    third, near = Number(Fraction(1, 3)), Number(Fraction("0.333"))
    assert is_same_number(near, third, 1e-3)
    assert not is_same_number(near, third, 1e-4)
    assert is_same_number(Number(Fraction(1010)), Number(Fraction(1000)), 0.01)
    assert not is_same_number(Number(Fraction(1011)), Number(Fraction(1000)), 0.01)


@given(st.integers(-(10**30), 10**30))
def test_every_whole_number_is_read_back(value: int) -> None:
    assert answer_in(f"it is {value:,} cm") == Number(Fraction(value))
    assert answer_in(f"it is {value}.") == Number(Fraction(value))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12))
def test_every_decimal_is_read_back(value: object) -> None:
    assert answer_in(f"= {value}") == Number(Fraction(value))


@given(st.text(alphabet="0123456789.,-+/%$eE #\\boxed{}frac x^*", max_size=200))
def test_no_text_makes_it_fail(text: str) -> None:
    assert all(isinstance(number.value, Fraction) for number in numbers_in(text))
    answer_in(text)


def test_boxed_braces_are_balanced() -> None:
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None


@pytest.mark.parametrize(
    "hostile",
    ["1,111" * 20_000, "1 " * 50_000, "9" * 300_000, "\\frac{" * 30_000, "\\boxed{" * 30_000,
     "-" * 100_000, "1/" * 50_000, "$ " * 50_000, "1e" * 50_000, "1 x 10^" * 20_000],
)  # fmt: skip
def test_hostile_text_takes_no_time(hostile: str) -> None:
    started = time.perf_counter()
    answer_in(hostile)
    assert time.perf_counter() - started < 10
