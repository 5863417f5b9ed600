"""Print the progress of a run.

On a terminal, the last line is overwritten at each step. Every few steps, a permanent line is
printed, which is not overwritten later. In a log file, only permanent lines are printed.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import format_duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

LOG_FILE_LINES = 40
"""The approximate number of progress lines of a whole run if the output is not a terminal."""
SMOOTHING = 0.8


def can_overwrite_lines(stream: TextIO) -> bool:
    """Whether a line on ``stream`` can be overwritten.

    This is True only for a terminal that supports control characters. A terminal does not support
    them if TERM is not set or is "dumb", for example with ``srun --pty`` from a batch script or in
    a shell inside an editor.
    """
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Progress:
    """Prints the progress of a run to ``stream``.

    A permanent line is a line that is not overwritten later. ``every`` is the number of steps from
    one permanent line to the next.
    """

    def __init__(self, stream: TextIO, total: int, every: int | None = None) -> None:
        self.stream, self.total = stream, max(1, total)
        self.every = max(1, every or -(-self.total // LOG_FILE_LINES))
        self.overwrites_lines = can_overwrite_lines(stream)
        self._step_s: float | None = None
        self._line_is_open = False

    def __call__(self, row: Mapping[str, Any], timings: Mapping[str, Any] | None) -> None:
        """Show a training step or an evaluation.

        ``row`` is a row of metrics.jsonl. ``timings`` is the step's row of timings.jsonl, or None
        for an evaluation.
        """
        if timings is None:
            self.print_line(evaluation_line(row))
            return
        step, step_s = row["step"], timings["step_s"]
        previous_s = step_s if self._step_s is None else self._step_s
        self._step_s = SMOOTHING * previous_s + (1 - SMOOTHING) * step_s
        left_s = (self.total - step) * self._step_s
        line = step_line(row, timings, self.total, left_s)
        if step == 1 or step % self.every == 0 or step == self.total:
            self.print_line(line)
        elif self.overwrites_lines:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{line[:width]}")
            self.stream.flush()
            self._line_is_open = True

    def print_line(self, line: str) -> None:
        """Print ``line`` as a permanent line (a line that is not overwritten later)."""
        self.stream.write(f"\r\x1b[K{line}\n" if self._line_is_open else f"{line}\n")
        self.stream.flush()
        self._line_is_open = False


def step_line(row: Mapping[str, Any], timings: Mapping[str, Any], total: int, left_s: float) -> str:
    """The progress line for a step, in aligned columns.

    The line contains the step, the mean and the standard deviation of the reward, the loss, KL, the
    completion length, tokens per second and the time left. With dynamic sampling, it also contains
    the share of groups with equal rewards, before and after such groups were replaced.
    """
    width = len(str(total))
    parts = [
        f"step {row['step']:>{width}}/{total}",
        f"reward {format_number(row.get('reward'), '6.3f')} "
        f"± {format_number(row.get('reward_std'), '5.3f')}",
        f"loss {format_number(row.get('loss'), '8.4f')}",
        f"kl {format_number(row.get('kl'), '7.4f')}",
        f"length {format_number(row.get('completion_length'), '6.1f')}",
        f"{timings['tokens_per_s']:>7.0f} tok/s",
        f"{format_duration(max(0.0, left_s))} left",
    ]
    before, after = (row.get(f"dynamic_sampling/no_spread_{name}") for name in ("before", "after"))
    if before and after is not None:
        parts.append(f"no spread {before:.0%} -> {after:.0%}")
    if row.get("skipped"):
        parts.append("skipped: not finite")
    return "  ".join(parts)


def evaluation_line(row: Mapping[str, Any]) -> str:
    """The line for an evaluation during training."""
    reward = format_number(row.get("eval/reward"), ".3f").strip()
    length = format_number(row.get("eval/completion_length"), ".1f").strip()
    return f"evaluation at step {row['step']}: reward {reward}, length {length}"


def format_number(value: object, format_spec: str) -> str:
    """Format ``value`` with the format specification ``format_spec``, for example ``8.4f``. If
    ``value`` is not a number, return a dash of the same width.
    """
    width = int(format_spec.split(".")[0] or 1)
    return format(value, format_spec) if isinstance(value, (int, float)) else "-".rjust(width)
