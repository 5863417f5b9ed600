"""Compare mathematical answers with the package Math-Verify (the optional dependency ``math``)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from toolkit.base.errors import MissingExtraError
from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.rewards.builtin import AnswerReward, Score


@dataclass(frozen=True, kw_only=True)
class MathVerify(AnswerReward):
    """1 if Math-Verify finds the completion equal to the answer (LaTeX, sets, intervals, ...), else
    0.

    Source: https://github.com/huggingface/Math-Verify. Math-Verify has two time limits, one for
    parsing and one for comparing. The toolkit replaces both limits by one limit per comparison
    (``seconds_each``). A comparison that takes longer scores 0. In the worker process
    (rewards/remote), the limit also applies to native code that cannot be interrupted, because the
    process is killed. If Math-Verify cannot read the dataset's answer, the score is None.
    """

    name: ClassVar[str] = "math_verify"
    seconds_each: float = 5.0

    def __post_init__(self) -> None:
        _import_math_verify()

    def score(self, text: str, answer: object) -> Score:
        try:
            return call_within(self.seconds_each, lambda: _verify(text, str(answer)))
        except OutOfTime:
            return 0.0


def _import_math_verify() -> Any:
    try:
        import math_verify  # noqa: PLC0415 - an optional dependency of this reward
    except ImportError as error:
        raise MissingExtraError(
            "reward math_verify needs the package math-verify, which is not installed",
            fix="run pip install 'grpo-toolkit[math]'",
        ) from error
    # Math-Verify logs warnings if its own time limits are off.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return math_verify


def _verify(text: str, answer: str) -> Score:
    library = _import_math_verify()
    gold = library.parse(answer.rsplit("####", 1)[-1].strip(), parsing_timeout=None)
    if not gold:
        return None
    guess = library.parse(text, parsing_timeout=None)
    return float(bool(library.verify(gold, guess, timeout_seconds=None)))
