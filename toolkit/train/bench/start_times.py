"""Measure the phases between the start of a process and the end of its first step.

A phase ends when ``StartTimer.end_phase`` is called, or when vLLM writes one of the log messages in
``VLLM_MARKS``. tests/contract/test_vllm_seams.py checks the texts of these messages for vLLM 0.25.1
and 0.31.0. If a message is missing, the time of its phase is added to the next phase.
"""

from __future__ import annotations

import logging
import os
import time

from toolkit.base.garbage_collection import collector_paused

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"
VLLM_MARKS = (
    ("Starting to load model", "configuration of vLLM"),
    ("Loading weights took", "making the model, reading safetensors"),
    ("Model loading took", "converting weights for the kernels, LoRA slots"),
    ("Graph capturing finished", "profiling run, KV cache, graph capture"),
    ("init engine (profile", "warm-up of the engine"),
)
"""Pairs: the beginning of a message of vLLM, and the phase that ends with this message."""


class StartTimer(logging.Handler):
    """Measures the duration of each phase of the start. ``phases`` maps the name of each phase to
    its seconds, in the order of the phases. Call ``import_packages`` before any heavy library is
    imported.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def import_packages(self) -> None:
        """Import the packages of a run, measure the seconds of each import, and begin to read
        vLLM's log messages.
        """
        os.environ.setdefault(LEVEL_VARIABLE, "INFO")
        with collector_paused():
            import torch  # noqa: F401, PLC0415

            self.end_phase("import torch")
            import transformers  # noqa: F401, PLC0415

            self.end_phase("import transformers")
            from toolkit.engine.open_engine import prepare_environment  # noqa: PLC0415
            from toolkit.engine.rollout_engine import vllm_available  # noqa: PLC0415

            prepare_environment()
            if vllm_available():
                from toolkit.engine import start  # noqa: F401, PLC0415

            self.end_phase("import vLLM")
            from toolkit import FastLanguageModel, GRPOTrainer  # noqa: F401, PLC0415

            self.end_phase("import TRL, PEFT and the trainer")
        logging.getLogger("vllm").addHandler(self)

    def end_phase(self, phase: str) -> None:
        """Record that ``phase`` ends now."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def emit(self, record: logging.LogRecord) -> None:
        """If ``record`` is a log message of vLLM that marks the end of a phase, end this phase.
        ``logging`` calls this method.
        """
        text = str(record.msg)
        phase = next((name for prefix, name in VLLM_MARKS if text.startswith(prefix)), None)
        if phase is not None:
            self.end_phase(phase)

    def stop(self) -> None:
        """Stop reading vLLM's log messages."""
        logging.getLogger("vllm").removeHandler(self)


def phase_table(phases: dict[str, float]) -> list[list[str]]:
    """Return the phases as rows of text: the name of a phase and its seconds. The first row is the
    sum.
    """
    rows = [["start and first step", f"{sum(phases.values()):.1f} s"]]
    return [*rows, *([f"  {name}", f"{seconds:.1f} s"] for name, seconds in phases.items())]
