"""The functions that notebooks import from ``unsloth.chat_templates``, under the toolkit's name."""

from __future__ import annotations

from toolkit.policy.notebook_templates import (
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    train_on_responses_only,
)

__all__ = [
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train_on_responses_only",
]
