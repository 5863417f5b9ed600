"""Word problems with one number as the answer: train.jsonl and eval.jsonl, without overlap."""

import json
import random
from pathlib import Path

NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "stamps")


def problem(draw: random.Random) -> tuple[str, int]:
    """One question and its answer."""
    first, second = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    have, more, boxes, each = (draw.randint(*ends) for ends in ((5, 60), (2, 40), (2, 9), (3, 12)))
    kind = draw.randrange(3)
    if kind == 0:
        text = (
            f"{first} has {have} {thing}. {second} has {more} more {thing} than {first}."
            f" How many {thing} do they have together?"
        )
        return text, 2 * have + more
    if kind == 1:
        given = draw.randint(1, boxes * each - 1)
        text = (
            f"{first} buys {boxes} boxes with {each} {thing} each and gives {given} {thing} to"
            f" {second}. How many {thing} does {first} have left?"
        )
        return text, boxes * each - given
    text = (
        f"{first} collects {each} {thing} every day for {boxes} days and already had {have}."
        f" How many {thing} does {first} have now?"
    )
    return text, boxes * each + have


def main() -> None:
    """Write both files into the current folder."""
    draw, seen = random.Random(0), {}
    while len(seen) < 2200:
        question, answer = problem(draw)
        seen[question] = answer
    rows = [json.dumps({"question": q, "answer": str(a)}) + "\n" for q, a in seen.items()]
    Path("train.jsonl").write_text("".join(rows[:2000]), encoding="utf-8")
    Path("eval.jsonl").write_text("".join(rows[2000:]), encoding="utf-8")


if __name__ == "__main__":
    main()
