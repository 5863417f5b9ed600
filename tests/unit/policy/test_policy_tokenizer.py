"""Padding is on the left. The padding token ends no sequence, and it is never added to the
vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.base.errors import ConfigError, InputError
from toolkit.policy.tokenizer import end_ids, fix_tokenizer, load_tokenizer


def _fake_model(*ends: int, rows: int = 100) -> Any:
    text_config = SimpleNamespace(vocab_size=rows)
    return SimpleNamespace(
        config=SimpleNamespace(pad_token_id=None, get_text_config=lambda: text_config),
        generation_config=SimpleNamespace(eos_token_id=list(ends) or None, pad_token_id=None),
    )


def _make_tokenizer(extra: list[str], pad: str | None) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "</s>", *extra]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token=pad)


def test_a_suitable_pad_token_is_kept() -> None:
    tokenizer, model = _make_tokenizer(["<fill>"], "<fill>"), _fake_model()
    fix_tokenizer(tokenizer, model)
    assert tokenizer.pad_token == "<fill>"
    assert tokenizer.padding_side == "left"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 3


@pytest.mark.parametrize(
    ("extra", "pad", "ends", "expected"),
    [
        (["<|finetune_right_pad_id|>"], None, (), "<|finetune_right_pad_id|>"),
        (["<pad>"], "</s>", (), "<pad>"),
        (["<|endoftext|>", "<|fim_pad|>"], "<|endoftext|>", (3,), "<|fim_pad|>"),
        (["<|reserved_1|>", "<|reserved_0|>"], None, (), "<|reserved_1|>"),
    ],
)
def test_a_pad_token_is_chosen_from_the_vocabulary(
    extra: list[str], pad: str | None, ends: tuple[int, ...], expected: str
) -> None:
    tokenizer = _make_tokenizer(extra, pad)
    size = len(tokenizer)
    fix_tokenizer(tokenizer, _fake_model(*ends))
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == size


def test_a_pad_token_without_a_row_in_the_embedding_is_replaced() -> None:
    tokenizer = _make_tokenizer(["<pad>", "<|endoftext|>", "<new>"], "<new>")
    fix_tokenizer(tokenizer, _fake_model(rows=5))
    assert tokenizer.pad_token == "<pad>"
    tokenizer = _make_tokenizer(["<new>", "<pad>"], "<new>")
    with pytest.warns(UserWarning, match="no padding token, so '</s>' is used"):
        fix_tokenizer(tokenizer, _fake_model(rows=3))


def test_the_model_names_the_end_token_if_the_tokenizer_does_not() -> None:
    tokenizer = _make_tokenizer(["<pad>"], None)
    tokenizer.eos_token = None
    fix_tokenizer(tokenizer, _fake_model(2, 1))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("b", "<pad>")
    tokenizer = _make_tokenizer([], None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names no token that ends a completion") as refused:
        fix_tokenizer(tokenizer, _fake_model())
    assert "tokenizer_config.json" in str(refused.value.fix)


def test_without_a_pad_token_the_eos_token_is_used_with_a_warning() -> None:
    tokenizer = _make_tokenizer([], None)
    with pytest.warns(UserWarning, match="no padding token, so '</s>' is used"):
        fix_tokenizer(tokenizer, _fake_model())
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == 3


def test_end_ids_contains_all_end_tokens() -> None:
    assert end_ids(_make_tokenizer([], None), _fake_model(0, 1)) == {0, 1, 2}
    single = _fake_model()
    single.generation_config.eos_token_id = 1
    assert end_ids(_make_tokenizer([], None), single) == {1, 2}


def test_loading_sets_padding_unless_fix_tokenizer_is_false(load: Any, tiny: Any) -> None:
    model, tokenizer = load()
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 128
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    _, untouched = load(fix_tokenizer=False)
    assert untouched.padding_side == load_tokenizer(tiny, max_seq_length=None).padding_side


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="the tokenizer in the folder cannot be read"):
        load_tokenizer(tmp_path, max_seq_length=None)
