"""Send a run to a tracker for which this package has no class. The tracker's callback in
transformers is used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class UpstreamTracker:
    """Calls transformers' callback for the tracker ``name`` (written for transformers 5.17).

    The callback runs in the tracker's own thread, not in the thread of the trainer.
    """

    destination = ""

    def __init__(self, name: str, trainer: Any) -> None:
        from transformers.integrations import (  # noqa: PLC0415 - slow: it searches for all trackers
            get_reporting_integration_callbacks,
        )

        self._trainer = trainer
        self._callback = get_reporting_integration_callbacks([name])[0]()
        self._call_callback("on_train_begin", model=trainer.model, processing_class=None)

    def log_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a row in the form in which transformers' trainer logs numbers."""
        self._call_callback("on_log", step=step, model=self._trainer.model, logs=dict(numbers))

    def log_table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing, because transformers' callbacks cannot send tables."""

    def close(self) -> None:
        """Tell the callback that training has ended."""
        self._call_callback("on_train_end", model=self._trainer.model, processing_class=None)

    def _call_callback(self, event: str, *, step: int | None = None, **keywords: Any) -> None:
        state = copy.copy(self._trainer.state)  # the trainer's own state may be at a later step
        if step is not None:
            state.global_step = step
        getattr(self._callback, event)(self._trainer.args, state, self._trainer.control, **keywords)
