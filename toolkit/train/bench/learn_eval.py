"""Measure the held-out accuracy of saved adapters, in the same way for all arms: ``python -m
toolkit.train.bench.learn_eval SETTINGS FOLDER``.

With every adapter, the model answers the same problems, with greedy decoding in transformers. An
answer is correct if the reward function of the training gives it the score 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from toolkit import FastLanguageModel
from toolkit.base.errors import InputError
from toolkit.train.bench.arm_settings import TARGET_MODULES
from toolkit.train.bench.learn_arm import number_is_right
from toolkit.train.bench.learn_settings import LearnResult, LearnSettings
from toolkit.train.bench.snapshots import adapter_tensors
from toolkit.train.bench.tasks import Problem, held_out_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 256


class Evaluator:
    """The base model with an adapter. Each evaluation loads the values of a saved adapter
    into it.
    """

    def __init__(self, settings: LearnSettings) -> None:
        self.tokens = settings.completion_tokens
        model, self.tokenizer = FastLanguageModel.from_pretrained(
            model_name=settings.model,
            max_seq_length=settings.max_seq_length,
            load_in_4bit=settings.load_in_4bit,
            fast_inference=False,
        )
        self.model = FastLanguageModel.get_peft_model(
            model, r=settings.r, lora_alpha=settings.r, target_modules=TARGET_MODULES
        )
        self.model.eval()
        self.problems = held_out_problems(settings.task, settings.held_out)
        self._base_accuracy: float | None = None

    def accuracy(self, adapter: Path) -> float:
        """Return the share of held-out problems that the base model answers correctly with the
        saved adapter ``adapter``.

        Raises:
            InputError: the tensors in the file are not those of an adapter with these settings.
        """
        stored = load_file(adapter)
        parameters = adapter_tensors(self.model)
        if stored.keys() != parameters.keys():
            unmatched_names = sorted(stored.keys() ^ parameters.keys())
            raise InputError(
                f"the file has {len(stored)} tensors, but an adapter with these settings has "
                f"{len(parameters)} tensors. {len(unmatched_names)} names are only in one of "
                f"the two, for example {unmatched_names[0]}",
                where=str(adapter),
                fix="delete the folder of results and run the benchmark again",
            )
        is_base = not any(bool(v.any()) for name, v in stored.items() if "lora_B" in name)
        if is_base and self._base_accuracy is not None:
            return self._base_accuracy
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])
        correct = sum(self._count_correct(batch) for batch in self._batches())
        share = correct / len(self.problems)
        if is_base:
            self._base_accuracy = share
        return share

    def answers(self, problems: list[Problem]) -> list[str]:
        """Return the answer of the model to each problem, as text. Decoding is greedy."""
        chats = [[{"role": "user", "content": problem.question}] for problem in problems]
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.tokens)
        completion_ids = ids[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return texts

    def _count_correct(self, problems: list[Problem]) -> float:
        texts = self.answers(problems)
        expected = [problem.answer for problem in problems]
        return sum(score == 1 for score in number_is_right(expected, texts, answer=expected))

    def _batches(self) -> Iterator[list[Problem]]:
        for start in range(0, len(self.problems), BATCH):
            yield self.problems[start : start + BATCH]


def evaluate(settings: LearnSettings, folder: Path) -> None:
    """Measure the accuracy of each saved adapter of the runs in ``folder``, and write it to the
    result of the run. An adapter that was measured before is skipped.
    """
    evaluator: Any = None
    for path in sorted(folder.glob("*-*.json")):
        result = LearnResult.read(path)
        for point in result.points:
            if point.accuracy is None:
                evaluator = evaluator or Evaluator(settings)
                point.accuracy = evaluator.accuracy(folder / point.adapter)
                result.write(path)


def main(settings_path: str, folder: str) -> None:
    """Evaluate the saved adapters of the runs in ``folder``."""
    evaluate(LearnSettings.read(Path(settings_path)), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:3])
