"""Limits of time, memory and text size stop a chat template that loops or renders a huge text."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.policy import render_template
from toolkit.policy.render_template import limit_template
from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals
from toolkit.train.data.prompt_format import check_template, count_tokens

if TYPE_CHECKING:
    from pathlib import Path

CHAT_MESSAGES = [{"role": "user", "content": "a b"}]
SIMPLE_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
ENDLESS_TEMPLATE = "{% for a in range(9**5) %}" * 3 + "{% endfor %}" * 3


def make_tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "</s>", "user", "?"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="?")
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ENDLESS_TEMPLATE, "did not end within"),
        ("{{ 9 ** (9 ** 9) }}", "did not end within|needs too much"),
        ("{{ messages[0].content * 10**12 }}", "needs too much"),
        ("{{ 'a' * 10**12 }}", "needs too much"),
        ("{{ '%2000000000d' % 1 }}", "needs too much"),
        ("{{ 'a'.center(10**11) }}", "needs too much"),
        ("{{ range(10**12)|list }}", "needs too much"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ n.x }}",
            "needs too much|did not end within",
        ),
        ("{{ 'a' * 10**8 }}", "makes a text of 100000000 characters|did not end within"),
    ],
)
def test_a_harmful_template_is_stopped(monkeypatch, text: str, problem: str) -> None:
    monkeypatch.setattr(render_template, "TIME_LIMIT_S", 1.0)
    limited = limit_template(make_tokenizer(text))
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=rf"the chat template of this tokenizer ({problem})"):
        check_template(limited, CHAT_MESSAGES, "prompt")
    assert time.monotonic() - begin < 20
    limited.chat_template = SIMPLE_TEMPLATE
    assert count_tokens(limited, CHAT_MESSAGES) == 3


def test_a_signal_stops_a_template() -> None:
    limited = limit_template(make_tokenizer(ENDLESS_TEMPLATE))
    signals = StopSignals()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with signals.installed(), pytest.raises(StepAbandoned):
        limited.apply_chat_template(CHAT_MESSAGES)


@pytest.mark.parametrize(
    "options",
    [{}, {"tokenize": False}, {"return_dict": False}, {"return_tensors": "pt"},
     {"add_generation_prompt": True, "return_dict": True}, {"truncation": True, "max_length": 2},
     {"chat_template": "{{ messages[0].content }}{{ more }}", "more": " b"},
     {"tokenizer_kwargs": {"return_attention_mask": False}},
     {"padding": "max_length", "max_length": 7}],
)  # fmt: skip
@pytest.mark.parametrize("chat", [CHAT_MESSAGES, [CHAT_MESSAGES, CHAT_MESSAGES]])
def test_a_limited_template_renders_like_upstream(chat: Any, options: dict[str, Any]) -> None:
    unlimited = make_tokenizer(SIMPLE_TEMPLATE)
    limited = limit_template(make_tokenizer(SIMPLE_TEMPLATE))
    expected, encoded = (t.apply_chat_template(chat, **options) for t in (unlimited, limited))
    if hasattr(expected, "items"):
        expected, encoded = dict(expected), dict(encoded)
    assert str(encoded) == str(expected)


def test_a_chat_with_assistant_masks_is_encoded_upstream() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    limited = limit_template(make_tokenizer(text))
    encoded = limited.apply_chat_template(
        CHAT_MESSAGES, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded["assistant_masks"] == [1, 1]


def test_the_limits_are_copied_with_the_tokenizer_but_not_saved(tmp_path: Path) -> None:
    limited = limit_template(make_tokenizer(SIMPLE_TEMPLATE))
    for other in (copy.deepcopy(limited), pickle.loads(pickle.dumps(limited))):
        other.chat_template = "{{ messages[0].role }}"
        assert other.apply_chat_template(CHAT_MESSAGES, tokenize=False) == "user"
    assert limited.apply_chat_template(CHAT_MESSAGES, tokenize=False) == "user a b "
    limited.save_pretrained(tmp_path)
    assert "_LimitedTemplate" not in "".join(
        path.read_text() for path in tmp_path.iterdir() if path.suffix == ".json"
    )


def tokenizer_with_response_template(pattern: str, arguments: dict[str, Any] | None = None) -> Any:
    """A tokenizer whose response template reads a tool call from each completion by ``pattern``."""
    tokenizer = make_tokenizer(SIMPLE_TEMPLATE)
    call = {"name": "f", "arguments": arguments or {"text": "{said}"}}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<a>",
        "fields": {
            "tool_calls": {
                "open_pattern": pattern,
                "repeats": True,
                "content": "text",
                "transform": {"type": "function", "function": call},
            },
            "content": {"content": "text"},
        },
    }
    return limit_template(tokenizer)


def test_a_response_pattern_that_never_ends_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(render_template, "TIME_LIMIT_S", 0.5)
    limited = tokenizer_with_response_template("(?P<said>(?:a|a|.)+)+$\\b\\B")
    with pytest.raises(ConfigError, match=r"response template, which .* calls, did not end"):
        limited.parse_response("a" * 60, prefix="<a>")


def test_a_lone_surrogate_in_a_tool_call_is_escaped() -> None:
    """A model can write a lone surrogate in JSON. It becomes text that can be rendered and
    tokenized.
    """
    limited = tokenizer_with_response_template(
        "(?P<said>.+)", {"text": ["{said}", "\ud800"], "\udfff": 1}
    )
    (call,) = limited.parse_response("a b", prefix="<a>")["tool_calls"]
    assert call["function"]["arguments"] == {"text": ["a b", "\\ud800"], "\\udfff": 1}
    limited.chat_template = "{{ messages[0].content }}\ud800"
    assert limited.apply_chat_template(CHAT_MESSAGES, tokenize=False) == "a b\\ud800"
    assert limited.apply_chat_template(CHAT_MESSAGES)["input_ids"]


def test_a_completion_that_is_nested_too_deeply_is_refused() -> None:
    value: Any = "x"
    for _ in range(200):
        value = {"a": value}
    with pytest.raises(ValueError, match="nested"):  # TRL then reads the completion as a text
        tokenizer_with_response_template("(?P<said>.+)", {"text": value}).parse_response(
            "a", prefix="<a>"
        )


def test_limits_are_fast() -> None:
    limited = limit_template(make_tokenizer(SIMPLE_TEMPLATE))
    begin = time.perf_counter()
    for _ in range(1000):
        count_tokens(limited, CHAT_MESSAGES)
    assert time.perf_counter() - begin < 3


def test_a_template_with_a_syntax_error_does_not_blame_the_prompts() -> None:
    limited = limit_template(make_tokenizer("{{ 1 }}\n{% for %}"))
    with pytest.raises(
        ConfigError, match=r"is not a valid template \(line 2\): Expected"
    ) as refused:
        limited.apply_chat_template(CHAT_MESSAGES)
    assert "tokenizer_config.json" in str(refused.value.fix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ ''.__class__.mro() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_an_error_in_a_template_becomes_a_config_error(text: str, message: str) -> None:
    limited = limit_template(make_tokenizer(text))
    with pytest.raises(ConfigError, match="chat template rejects the prompts: ") as refused:
        limited.apply_chat_template(CHAT_MESSAGES)
    assert message in refused.value.message
