"""Measure the memory of a run of calibrate_matrix.py, and compare it with the prediction."""

from __future__ import annotations

import gc
import random
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from toolkit.engine.rollout_request import Sampling
from toolkit.sizing.calibrate import MEASURED_TERMS, PEAK_KEYS

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.run_config import RunConfig
    from toolkit.sizing import SizingResult
    from toolkit.train.report.memory_peaks import PhasePeaks

NEW_TOKENS = 8  # of each sequence that the engine samples
MAX_ERROR, MAX_UNUSED = 0.05, 0.08  # shares: relative to the measured peak; of the card's memory


class FullLength:
    """Replaces the engine's samples by random completions: one has the full length, the others are
    shorter.

    The engine still samples, with as many sequences as it runs at once and as many prompt tokens as
    one of its steps holds, so that the rollout has its real peak. Its samples are not used.
    """

    def __init__(self, trainer: Any, engine: Any, peaks: PhasePeaks | None) -> None:
        self.trainer, self.engine, self.peaks = trainer, engine, peaks
        self.vocabulary = trainer.model.config.vocab_size
        self.draw = random.Random(0)

    def sync_weights(self) -> None:
        self.engine.publish(self.trainer.accelerator.unwrap_model(self.trainer.model))
        gc.collect()  # frees the adapter of the previous run

    def generate(self, prompts: list[list[int]], *_: Any, **__: Any) -> tuple[Any, Any, Any, Any]:
        with nullcontext() if self.peaks is None else self.peaks.sampling(self.engine):
            self.sample()
            self.engine.sleep()
        length = self.trainer.max_completion_length
        shorter = [self.draw.randint(length // 2, length) for _ in prompts[1:]]
        ids = [self.tokens(count) for count in (length, *shorter)]
        logprobs = [[[-5.0]] * len(row) for row in ids]
        return prompts, ids, logprobs, [[[token] for token in row] for row in ids]

    def sample(self) -> None:
        """Sample a few tokens of max_num_seqs sequences; one step holds all their prompts."""
        options = self.engine.options
        sequences, batched = options.max_num_seqs or 8, options.max_num_batched_tokens or 8192
        prompt_tokens = min(self.engine.max_model_len - NEW_TOKENS, batched // sequences)
        prompts = [self.tokens(max(prompt_tokens, 1)) for _ in range(sequences)]
        sampling = Sampling(n=1, max_tokens=NEW_TOKENS, logprobs=0, extra={"ignore_eos": True})
        rollout = self.engine.generate(prompts, sampling, seed=self.draw.randrange(1 << 30))
        if any(len(row) != NEW_TOKENS for row in rollout.completion_ids):
            raise RuntimeError("the engine did not sample what it was asked for")

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(10, self.vocabulary) for _ in range(count)]


def train(model: Any, tokenizer: Any, config: RunConfig, work: Path) -> dict[str, int]:
    """Train two steps and return bytes: torch's peak by phase, the peak of the step above the
    memory that stays allocated, and the used memory of the whole card. Empty on the CPU.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig

    from toolkit import GRPOTrainer
    from toolkit.engine.engine_memory import asleep_bytes
    from toolkit.train.report.memory_peaks import CudaStatistics, PhasePeaks

    cuda = torch.cuda.is_available()
    grpo = dict(config.grpo)
    words, vocabulary = grpo.pop("max_prompt_length"), model.config.vocab_size
    numbers = [[10 + (row + word) % (vocabulary - 10) for word in range(words)] for row in range(8)]
    rows = [{"prompt": " ".join(f"t{number}" for number in row)} for row in numbers]
    arguments = GRPOConfig(
        output_dir=str(work / "out"),
        max_steps=2,
        learning_rate=1e-6,
        bf16=cuda,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=1,
        gradient_checkpointing=config.lora.use_gradient_checkpointing is True,
        **grpo,
    )
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
    )
    tokens = config.runtime.pack_tokens
    trainer.pack_tokens = tokens if isinstance(tokens, int) else None
    peaks = PhasePeaks(CudaStatistics(asleep_bytes)) if cuda else None
    trainer.vllm_generation = FullLength(trainer, model.toolkit_engine, peaks)
    if peaks is not None:
        torch.cuda.empty_cache()
        peaks.begin()
    trainer.train()
    if trainer.min_parts > 1:  # the trainer split a micro-batch, which sizing did not assume
        raise MemoryError(f"the micro-batch was cut in {trainer.min_parts} parts")
    if peaks is None:
        return {}
    peaks.end_training()
    return peaks.terms()


def terms_of(
    result: SizingResult,
    measured: dict[str, int],
    names: tuple[str, ...],
    *,
    sized_for_it: bool = False,
) -> list[dict[str, Any]]:
    """Rows with predicted and measured bytes, and the verdict on each peak.

    The used share of the card gets a verdict only for the run for which the engine was sized:
    smaller runs leave more memory unused on purpose.
    """
    budget = {str(line["term"]): int(line["bytes"]) for line in result.budget}
    predicted = {
        name: sum(budget.get(term, 0) for term in terms) for name, terms in MEASURED_TERMS.items()
    }
    predicted |= {name: int(getattr(result.peaks, key)) for name, key in PEAK_KEYS.items()}
    rows = []
    for name in names:
        measured_bytes = measured.get(name)
        verdict = ""
        if measured_bytes and name.startswith("peak"):
            is_close = abs(predicted[name] / measured_bytes - 1) <= MAX_ERROR
            verdict = "ok" if is_close and measured_bytes <= result.peaks.bound_bytes else "OUTSIDE"
        rows.append(_row(name, predicted[name], measured_bytes or None, verdict))
    if "card.total" in measured:
        unused = 1 - measured["card.used"] / measured["card.total"]
        verdict = "smaller than what the engine was sized for"
        if sized_for_it:
            verdict = "ok" if unused <= MAX_UNUSED else "more than 8 % unused"
        rows.append(_row("card used", measured["card.total"], measured["card.used"], verdict))
    return rows


def _row(term: str, predicted: int, measured: int | None, verdict: str) -> dict[str, Any]:
    return {"term": term, "predicted": predicted, "measured": measured, "verdict": verdict}
