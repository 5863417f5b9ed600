"""Load the tokenizer of a checkpoint, prepared for generation in batches."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from toolkit.base.errors import InputError, ToolkitWarning, first_line
from toolkit.base.files import check_folder
from toolkit.policy.render_template import limit_template

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|fim_pad|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|dummy_0|>",
    "<unk>",
)
"""Padding tokens of published vocabularies that do not occur in text, the best first (Llama 3,
Qwen, Phi, ...).
"""


def load_tokenizer(
    folder: Path, *, max_seq_length: int | None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer in ``folder``; ``max_seq_length`` (tokens) becomes its
    ``model_max_length``.

    Raises:
        InputError: the folder has no tokenizer.
    """
    check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"has no readable tokenizer: {first_line(error)}",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    return limit_template(tokenizer)


def fix_tokenizer(tokenizer: Any, model: Any) -> None:
    """Make ``tokenizer`` pad on the left, with a token that does not end a sequence if the
    vocabulary has one.

    No token is added to the vocabulary, because that would change the embeddings. The pad id is set
    in ``model``'s configs. Generation from a batch needs left padding. If the pad token were also
    the end of sequence, the loss would exclude the end of each completion.
    """
    tokenizer.padding_side = "left"
    ends = end_ids(tokenizer, model)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        token = _find_pad(tokenizer, ends)
        if token is None:
            warnings.warn(
                f"the vocabulary has no padding token, so {tokenizer.eos_token!r} is used",
                ToolkitWarning,
                stacklevel=4,
            )
            token = tokenizer.eos_token
        tokenizer.pad_token = token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def end_ids(tokenizer: Any, model: Any) -> set[int]:
    """Every token id that ends a completion, from the tokenizer and the generation config."""
    ends: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(listed, int):
        return ends | {listed}
    return ends | set(listed or ())


def _find_pad(tokenizer: Any, ends: Collection[int]) -> str | None:
    vocabulary = tokenizer.get_vocab()
    for name in PAD_NAMES:
        if name in vocabulary and vocabulary[name] not in ends:
            return name
    reserved = [name for name in vocabulary if "reserved" in name and vocabulary[name] not in ends]
    return min(reserved, key=lambda name: vocabulary[name], default=None)
