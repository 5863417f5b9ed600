"""Train one arm of ``bench --learn`` with one seed in its own process: ``python -m
toolkit.train.bench.learn_arm ARM SETTINGS RESULT``.

Adapters are saved during the training. After the training, ``learn_eval`` evaluates them. So all
arms have the same evaluator, and the training time includes no evaluation. The training time starts
at the first optimizer step, because the time of loading is reported separately. The clock is
stopped while an adapter is saved.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from toolkit.base.errors import first_line
from toolkit.train.bench import arms
from toolkit.train.bench.learn_settings import LearnResult, LearnSettings
from toolkit.train.bench.tasks import training_problems


def run_arm(settings: LearnSettings, result: LearnResult, path: Path) -> None:
    """Load the model and train. After each saved adapter, ``result`` is written to ``path``."""
    start = time.perf_counter()
    arms.prepare_process(result.arm)
    trainer = arms.BUILDERS[result.arm](settings, learning_job())
    result.load_s = time.perf_counter() - start
    # After the arm, because Unsloth must be imported before torch.
    from toolkit.train.bench import snapshots  # noqa: PLC0415

    result.versions = arms.package_versions()
    result.generation = snapshots.generation_library(trainer)
    folder = path.parent / result.name
    folder.mkdir(parents=True, exist_ok=True)
    trainer.add_callback(
        snapshots.Snapshots(
            result,
            settings,
            lambda step: snapshots.save_adapter(trainer.model, folder, step),
            lambda: result.write(path),
        )
    )
    trainer.train()


def learning_job() -> arms.Job:
    """Return the data and the reward function of the arm. The rows are chats with a question, and
    the reward compares the number in the completion with the answer.
    """
    return arms.Job(rows=rows, reward=number_is_right)


def rows(settings: Any) -> list[dict[str, Any]]:
    """Return the training problems for the seed in ``settings``, as chats."""
    count = settings.prompts * settings.steps
    return [
        {"prompt": [{"role": "user", "content": problem.question}], "answer": problem.answer}
        for problem in training_problems(settings.task, count, settings.seed)
    ]


def number_is_right(prompts: Any, completions: Any, answer: object, **_: Any) -> list[float]:
    """Return the scores of completions from the toolkit's reward ``numeric_match``. TRL logs the
    rewards under the name of this function.
    """
    from toolkit.train.rewards.builtin import NumericMatch  # noqa: PLC0415 - after the arm

    scores = NumericMatch()(prompts, completions, answer=answer)
    return [0.0 if score is None else score for score in scores]


def main(arm: str, settings_path: str, result_path: str) -> None:
    """Run one arm and write its result, even if the arm fails."""
    settings = LearnSettings.read(Path(settings_path))
    result = LearnResult(arm, settings.seed)
    try:
        run_arm(settings, result, Path(result_path))
    except Exception as error:  # reported in the result; the arm's log has the traceback
        result.not_run = f"{type(error).__name__}: {first_line(error)}"
        raise
    finally:
        result.write(Path(result_path))


if __name__ == "__main__":
    main(*sys.argv[1:4])
