"""The built-in rewards and their options, as ``toolkit.train.rewards`` has them (a test holds
them together).
"""

from __future__ import annotations

# reward -> option -> whether it must be given
BUILTIN_OPTIONS: dict[str, dict[str, bool]] = {
    "exact_match": {"column": False, "tag": False, "ignore_case": False},
    "numeric_match": {"column": False, "tag": False, "tolerance": False},
    "regex_match": {"pattern": True, "full": False, "ignore_case": False},
    "format": {"tags": False, "strict": False, "opened": False, "partial": False},
    "length_penalty": {"max_length": True, "margin": False, "unit": False},
    "math_verify": {"column": False, "tag": False, "seconds_each": False},
}
