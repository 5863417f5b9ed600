"""Padding: on the left, by a token that ends nothing, and never by a new one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.base.errors import InputError
from toolkit.policy.tokenizer import end_ids, fix_tokenizer, load_tokenizer


def _model(*ends: int) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(pad_token_id=None),
        generation_config=SimpleNamespace(eos_token_id=list(ends) or None, pad_token_id=None),
    )


def _tokenizer(extra: list[str], pad: str | None) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "</s>", *extra]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token=pad)


def test_a_good_pad_token_is_kept() -> None:
    tokenizer, model = _tokenizer(["<fill>"], "<fill>"), _model()
    fix_tokenizer(tokenizer, model)
    assert tokenizer.pad_token == "<fill>"
    assert tokenizer.padding_side == "left"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 3


@pytest.mark.parametrize(
    ("extra", "pad", "ends", "found"),
    [
        (["<|finetune_right_pad_id|>"], None, (), "<|finetune_right_pad_id|>"),
        (["<pad>"], "</s>", (), "<pad>"),
        (["<|endoftext|>", "<|fim_pad|>"], "<|endoftext|>", (3,), "<|fim_pad|>"),
        (["<|reserved_1|>", "<|reserved_0|>"], None, (), "<|reserved_1|>"),
    ],
)
def test_another_token_of_the_vocabulary_is_found(
    extra: list[str], pad: str | None, ends: tuple[int, ...], found: str
) -> None:
    tokenizer = _tokenizer(extra, pad)
    size = len(tokenizer)
    fix_tokenizer(tokenizer, _model(*ends))
    assert tokenizer.pad_token == found
    assert len(tokenizer) == size


def test_with_no_such_token_the_end_is_used_and_said() -> None:
    tokenizer = _tokenizer([], None)
    with pytest.warns(UserWarning, match="no padding token, so '</s>' is used"):
        fix_tokenizer(tokenizer, _model())
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == 3


def test_every_end_counts() -> None:
    assert end_ids(_tokenizer([], None), _model(0, 1)) == {0, 1, 2}
    single = _model()
    single.generation_config.eos_token_id = 1
    assert end_ids(_tokenizer([], None), single) == {1, 2}


def test_loading_fixes_it_unless_told_not_to(load: Any, tiny: Any) -> None:
    model, tokenizer = load()
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 128
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    _, untouched = load(fix_tokenizer=False)
    assert untouched.padding_side == load_tokenizer(tiny, max_seq_length=None).padding_side


def test_a_folder_without_one(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="the tokenizer in the folder cannot be read"):
        load_tokenizer(tmp_path, max_seq_length=None)
