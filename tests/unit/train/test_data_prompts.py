"""Prompts (texts and chats) are checked, get a system prompt, and are truncated from the left."""

from __future__ import annotations

from typing import Any

import pytest
from data_helpers import make_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.base.errors import ConfigError
from toolkit.train.data import prompt_format


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2], "must be a text or a list of messages, not int"),
        ([[user("x")], [{"content": "x"}]], "message 1 has no role"),
        ([[user("x")], ["x"]], "message 1 has no role"),
        ([[{"role": "human", "content": "x"}]], "role 'human', not one of system"),
        ([[{"role": "user"}]], "message 1 must have a text as content"),
        ([[user(5)]], "message 1 must have a text as content"),
        ([[user("x"), {"role": "assistant", "content": "y"}]], "nothing to answer"),
    ],
)
def test_the_error_for_an_invalid_prompt_names_the_row(prompts: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"data row .*column 'q' .*{message}"):
        prompt_format.check_prompts(prompts, "q", lambda index: f"data row {index + 1}")


@pytest.mark.parametrize(
    ("prompts", "is_chat"),
    [
        (["a", None], False),
        ([[user("a")], None], True),
        ([None], False),
        ([[user([{"text": "a"}])]], True),
    ],
)
def test_valid_prompts_are_accepted(prompts: list[Any], is_chat: bool) -> None:
    assert prompt_format.check_prompts(prompts, "q", str) is is_chat


@pytest.mark.parametrize("prompt", [None, "", " \n", [], [user("")], [user(None)]])
def test_empty_prompts(prompt: Any) -> None:
    assert prompt_format.is_empty(prompt)
    assert not prompt_format.is_empty("x")
    assert not prompt_format.is_empty([user("x")])


def test_the_chat_format_and_a_system_prompt() -> None:
    system = {"role": "system", "content": "S"}
    put = prompt_format.format_prompt
    assert put("q", None, chat=False) == "q"
    assert put("q", None, chat=True) == [user("q")]
    assert put("q", "S", chat=True) == [system, user("q")]
    assert put("q", "S", chat=False) == "S\n\nq"
    assert put([user("q")], "S", chat=True) == [system, user("q")]
    assert put([user("q")], None, chat=True) == [user("q")]
    own = [{"role": "system", "content": "own"}, user("q")]
    assert put(own, "S", chat=True) == own


def test_tokens_are_counted_with_the_arguments_of_the_template() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<assistant>", "<assistant>{{ more }}"
    )
    arguments = {"more": "w1 w2"}
    longer = prompt_format.count_tokens(tokenizer, [user("w3 w4")], arguments)
    assert longer == prompt_format.count_tokens(tokenizer, [user("w3 w4")]) + 2
    cut = prompt_format.truncate_prompt(tokenizer, [user("w3 w4")], longer - 1, arguments)
    assert cut == [user("w4")]
    ids = prompt_format.token_ids([[user("w3")], [user("w3 w4")]], tokenizer, arguments)
    assert [len(row) for row in ids] == [longer - 1, longer]


def test_a_missing_template_or_a_rejected_chat_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        prompt_format.check_template(make_tokenizer(), [user("x")], "q")
    late = [user("x"), {"role": "system", "content": "y"}]
    with pytest.raises(ConfigError, match="rejects the prompts: system must come first"):
        prompt_format.check_template(make_tokenizer(chat=True), late, "q")


def test_the_first_tokens_of_a_text_are_removed() -> None:
    tokenizer = make_tokenizer()
    text = " ".join(f"w{number}" for number in range(10))
    assert prompt_format.truncate_prompt(tokenizer, text, 4) == "w7 w8 w9"  # 4 tokens with <s>
    assert prompt_format.truncate_prompt(tokenizer, text, 11) == text
    with pytest.raises(
        ConfigError, match=r"max_prompt_length .1 tokens., because the special tokens alone have 1"
    ):
        prompt_format.truncate_prompt(tokenizer, text, 1)


def test_a_truncated_chat_keeps_its_system_message_and_roles() -> None:
    tokenizer = make_tokenizer(chat=True)
    chat = [
        {"role": "system", "content": "w1 w2"},
        user("w3 w4 w5"),
        {"role": "assistant", "content": "w6 w7"},
        user("w8 w9"),
    ]
    whole = prompt_format.count_tokens(tokenizer, chat)
    assert whole == 2 + 3 + 2 + 2 + 2 * 4 + 1
    shorter = prompt_format.truncate_prompt(tokenizer, chat, whole - 4)
    assert [message["content"] for message in shorter] == ["w1 w2", "", "w7", "w8 w9"]
    assert chat[1]["content"] == "w3 w4 w5"
    with pytest.raises(ConfigError, match="system prompt and chat template alone have 11 tokens"):
        prompt_format.truncate_prompt(tokenizer, chat, 5)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc .0123\nw<>/s\u00e9", min_size=1, max_size=60), st.integers(2, 20))
def test_a_truncated_prompt_fits_and_is_the_end_of_the_text(text: str, limit: int) -> None:
    tokenizer = make_tokenizer()
    if prompt_format.count_tokens(tokenizer, text) <= limit:
        return
    cut = prompt_format.truncate_prompt(tokenizer, text, limit)
    assert prompt_format.count_tokens(tokenizer, cut) <= limit
    assert text.endswith(cut)
    assert cut
