"""Load the tokenizer of a checkpoint, and set its padding for generation in batches."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from toolkit.base.errors import ConfigError, InputError, ToolkitWarning, first_line
from toolkit.base.files import check_folder
from toolkit.policy.render_template import limit_template

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
"""Tokens of published vocabularies (Llama 3, Qwen, Phi, ...) that can be used for padding, because
they do not occur in text. The most suitable tokens come first.
"""


def load_tokenizer(
    folder: Path, *, max_seq_length: int | None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer in ``folder``, and set its ``model_max_length`` to ``max_seq_length``
    tokens.

    Raises:
        InputError: the folder has no tokenizer.
    """
    check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"the tokenizer in the folder cannot be read: {first_line(error)}",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    return limit_template(tokenizer)


def fix_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Make ``tokenizer`` pad on the left, and choose its pad token. Set the pad id also in the
    configs of ``model``.

    Generation from a batch needs left padding. If possible, the pad token is a token that does not
    end a sequence. If the pad token also ended sequences, the loss would exclude the end of each
    completion. No token is added to the vocabulary, because that would change the embeddings. If
    the tokenizer names no end token, the model's configs name it.

    Raises:
        ConfigError: there is neither an end token nor a token for padding.
    """
    tokenizer.padding_side = "left"
    # With tensor parallelism, a process has only a part of the embedding's rows.
    rows = model.config.get_text_config().vocab_size
    end_token_ids = end_ids(tokenizer, model)
    if tokenizer.eos_token_id is None and end_token_ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(end_token_ids))
    unusable_ids = {None, *end_token_ids}
    if tokenizer.pad_token_id in unusable_ids or tokenizer.pad_token_id >= rows:
        token = _find_pad_token(tokenizer, end_token_ids, rows)
        if token is None and tokenizer.eos_token is None:
            raise ConfigError(
                "the tokenizer names no token that ends a completion, and its vocabulary has no "
                "token for padding",
                where=str(tokenizer.name_or_path),
                fix="set eos_token in tokenizer_config.json in the model's folder",
            )
        if token is None:
            warnings.warn(
                f"the vocabulary has no padding token, so {tokenizer.eos_token!r} is used for "
                "padding",
                ToolkitWarning,
                stacklevel=4,
            )
            token = tokenizer.eos_token
        tokenizer.pad_token = token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def end_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """Return all token ids that end a completion. They come from the tokenizer and the model's
    generation config.
    """
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(configured, int):
        return ids | {configured}
    return ids | set(configured or ())


def _find_pad_token(
    tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int], rows: int
) -> str | None:
    """Return a token of the vocabulary that can be used for padding and does not end a completion.
    If there is no such token, return None. ``rows`` is the number of rows of the model's embedding.
    """
    vocabulary = {name: index for name, index in tokenizer.get_vocab().items() if index < rows}
    for name in PAD_NAMES:
        if name in vocabulary and vocabulary[name] not in end_token_ids:
            return name
    reserved = [
        name for name in vocabulary if "reserved" in name and vocabulary[name] not in end_token_ids
    ]
    return min(reserved, key=lambda name: vocabulary[name], default=None)
