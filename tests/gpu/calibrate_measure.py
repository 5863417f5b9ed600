"""What is measured in a run of calibrate_matrix.py, and how it is set beside the prediction."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from toolkit.sizing.calibrate import MEASURED_AS

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.model import RunConfig
    from toolkit.sizing import SizingResult

WITHIN, UNUSED = 0.05, 0.08  # of the prediction; of the card


class FullLength:
    """In place of the engine's sampling: random completions, one of the full length, the rest
    shorter.
    """

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.vocabulary, self.draw = length, vocabulary, random.Random(0)

    def sync_weights(self) -> None:
        """Nothing is published: the engine samples once, by itself."""

    def generate(self, prompts: list[list[int]], *_: Any, **__: Any) -> tuple[Any, Any, Any, Any]:
        shorter = [self.draw.randint(self.length // 2, self.length) for _ in prompts[1:]]
        lengths = [self.length, *shorter]
        last = self.vocabulary
        ids = [[self.draw.randrange(10, last) for _ in range(count)] for count in lengths]
        logprobs = [[[-5.0]] * len(row) for row in ids]
        return prompts, ids, logprobs, [[[token] for token in row] for row in ids]


def measure_engine(engine: Any) -> dict[str, int]:
    """The engine's own account (vLLM's worker, read at 0.25.1), in bytes; empty on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    names = {
        "engine.activations": "peak_activation_memory",
        "engine.runtime": "non_torch_memory",
        "engine.cuda_graphs": "cudagraph_memory_estimate",
        "engine.kv": "available_kv_cache_memory_bytes",
    }
    found = {term: int(getattr(worker, name, 0) or 0) for term, name in names.items()}
    return {"engine.loaded": int(worker.model_runner.model_memory_usage), **found}


def train(model: Any, tokenizer: Any, config: RunConfig, work: Path) -> dict[str, int]:
    """Two steps; bytes of torch's peak, of the step above what stays, and of the whole card in
    use.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig

    from toolkit import GRPOTrainer

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
    trainer.vllm_generation = FullLength(grpo["max_completion_length"], vocabulary)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if trainer._split > 1:  # the trainer survives by cutting the micro-batch: not as sized
        raise MemoryError(f"the micro-batch was cut in {trainer._split} parts")
    if not cuda:
        return {}
    free, total = torch.cuda.mem_get_info()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "peak.training": peak,
        "trainer.step": peak - torch.cuda.memory_allocated(),
        "card.used": total - free - torch.cuda.memory_reserved() + reserved,
        "card.total": total,
    }


def terms_of(
    result: SizingResult,
    measured: dict[str, int],
    names: tuple[str, ...],
    *,
    sized_for_it: bool = False,
) -> list[dict[str, Any]]:
    """Predicted beside measured, with the verdict on each peak.

    How much of the card is used is judged for the run that the engine was sized for: the smaller
    ones leave more, on purpose.
    """
    budget = {str(line["term"]): int(line["bytes"]) for line in result.budget}
    predicted = {
        name: sum(budget.get(term, 0) for term in terms) for name, terms in MEASURED_AS.items()
    }
    predicted["peak.training"] = result.peaks.training_bytes
    rows = []
    for name in names:
        found = measured.get(name)
        verdict = ""
        if found and name.startswith("peak"):
            near = abs(predicted[name] / found - 1) <= WITHIN
            verdict = "ok" if near and found <= result.peaks.bound_bytes else "OUTSIDE"
        rows.append(_row(name, predicted[name], found or None, verdict))
    if "card.total" in measured:
        unused = 1 - measured["card.used"] / measured["card.total"]
        verdict = "smaller than what the engine was sized for"
        if sized_for_it:
            verdict = "ok" if unused <= UNUSED else "more than 8 % unused"
        rows.append(_row("card used", measured["card.total"], measured["card.used"], verdict))
    return rows


def _row(term: str, predicted: int, measured: int | None, verdict: str) -> dict[str, Any]:
    return {"term": term, "predicted": predicted, "measured": measured, "verdict": verdict}
