"""How large and how deep a run file may be: far above what a run needs, and low enough that reading
is always fast.
"""

from __future__ import annotations

MAX_BYTES = 1 << 19
MAX_DEPTH = 40
MAX_NODES = 50_000
MAX_ALIASED = 5_000  # values that aliases expand to; an alias bomb is detected early
MAX_DIGITS = 400  # a longer number stays text: int() of a million digits takes minutes
MAX_FINDINGS = 500  # further findings are only counted
MAX_SUGGESTIONS = 50  # unknown keys that get a did-you-mean
MAX_LAYERS = 16  # files that extend one another
PIPE_WAIT_S = 1.5

TOO_ALIASED = f"aliases expand to more than {MAX_ALIASED} values"
