"""The index of a completion in the whole batch does not depend on the rank that draws it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from toolkit.train.rollout.completion_index import CompletionIndex


def trainer(rank: int = 0, ranks: int = 1, *, steps: int = 1, **more: Any) -> Any:
    return SimpleNamespace(
        accelerator=SimpleNamespace(process_index=rank, num_processes=ranks),
        args=SimpleNamespace(seed=3, steps_per_generation=steps),
        model=SimpleNamespace(training=more.pop("training", True)),
        state=SimpleNamespace(global_step=more.pop("global_step", 0)),
        num_iterations=1,
        micro_steps=more.pop("step", 0),
        tools=more.pop("tools", None),
    )


def draws(
    drawing_trainer: Any, prompts: list[list[int]], batches: int = 1
) -> list[tuple[int, int]]:
    """(seed of the call, row) for each completion that a rank draws."""
    rows, found = CompletionIndex(drawing_trainer), []
    for _ in range(batches):
        rows.begin_batch(len(prompts))
        seed, numbers = rows.begin_call(prompts)
        rows.record_completions(numbers, prompts, prompts)
        found += [(seed, number) for number in numbers]
    return found


def test_ranks_share_the_rows_of_one_process() -> None:
    prompts = [[1]] * 8
    whole = draws(trainer(), prompts)
    assert whole == [*draws(trainer(0, 2), prompts[:4]), *draws(trainer(1, 2), prompts[4:])]
    assert len({seed for seed, _ in whole}) == 1
    assert [row for _, row in whole] == list(range(8))


def test_the_rows_of_a_generation_do_not_depend_on_its_micro_steps() -> None:
    """One process has four micro-steps per generation, and each of two processes has two."""
    for generation in range(3):
        one = draws(trainer(steps=4, step=4 * generation), [[1]] * 4)
        two = draws(trainer(0, 2, steps=2, step=2 * generation), [[1]] * 2)
        assert two == one[:2]
    later = draws(trainer(steps=4, step=4), [[1]])
    assert later != draws(trainer(steps=4, step=0), [[1]])


def test_evaluation_counts_across_batches_and_shares_no_draw_with_training() -> None:
    whole = draws(trainer(training=False, global_step=5), [[1]] * 4, batches=2)
    parts = [draws(trainer(r, 2, training=False, global_step=5), [[1]], batches=4) for r in (0, 1)]
    assert sorted(whole) == sorted(parts[0] + parts[1])
    assert len(set(whole)) == 8
    assert not set(whole) & set(draws(trainer(step=5, global_step=5), [[1]] * 8))


def test_the_same_batch_twice_is_two_draws() -> None:
    twice = draws(trainer(), [[1]] * 4, batches=2)
    assert len(set(twice)) == 8


def test_a_turn_of_the_tool_loop_finds_its_rows() -> None:
    """The turn has prompts of some of the rows only, and TRL does not say of which rows."""
    rows = CompletionIndex(trainer(1, 2, tools=[print]))
    prompts = [[1, 2]] * 4
    rows.begin_batch(4)
    first, numbers = rows.begin_call(prompts)
    assert numbers == [4, 5, 6, 7]
    completions = [[7], [8], [7], [9]]
    rows.record_completions(numbers, prompts, completions)
    next_prompts = [[1, 2, 8, 50], [1, 2, 7, 50], [1, 2, 9, 51]]
    second, numbers = rows.begin_call(next_prompts)
    assert numbers == [5, 6, 7]
    assert second != first
    rows.record_completions(numbers, next_prompts, [[3], [3], [4]])
    third, numbers = rows.begin_call([[1, 2, 7, 50, 3, 60]])
    assert numbers == [6]
    assert third not in (first, second)
    rows.record_completions(numbers, [[1, 2, 7, 50, 3, 60]], [[5]])
    rows.begin_batch(4)
    assert rows.begin_call(prompts) == (first, [12, 13, 14, 15])


def test_a_row_with_a_truncated_completion_is_found_by_its_position() -> None:
    rows = CompletionIndex(trainer(tools=[print]))
    rows.begin_batch(3)
    _, numbers = rows.begin_call([[1]] * 3)
    rows.record_completions(numbers, [[1]] * 3, [[4, 5, 6], [7, 8], [9]])
    _, numbers = rows.begin_call([[1, 4, 50], [1, 7, 8, 50], [1, 9, 50]])
    assert numbers == [0, 1, 2]


def test_a_trainer_without_attributes_is_sufficient() -> None:
    rows = CompletionIndex(SimpleNamespace())
    assert rows.begin_call([[1], [2]])[1] == [0, 1]
