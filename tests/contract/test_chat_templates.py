"""transformers 5.17 finds a chat template where ``config.chat_format`` looks for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from toolkit.config.chat_format import template_in, usable

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = [{"name": "default", "template": TEXT}, {"name": "tool_use", "template": TEXT}]


@pytest.mark.parametrize(
    ("in_config", "files", "found"),
    [
        (None, {}, False),
        (TEXT, {}, True),
        ("", {}, False),
        (NAMED, {}, True),
        (NAMED[1:], {}, False),
        (None, {"chat_template.jinja": TEXT}, True),
        (TEXT, {"chat_template.jinja": ""}, False),
        (None, {"additional_chat_templates/default.jinja": TEXT}, True),
        (TEXT, {"additional_chat_templates/tool_use.jinja": TEXT}, False),
        (None, {"chat_template.jinja": TEXT, "additional_chat_templates/rag.jinja": TEXT}, True),
    ],
)
def test_the_files_say_what_the_tokenizer_says(
    tmp_path: Path, in_config: Any, files: dict[str, str], found: bool
) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    written = json.loads(config.read_text())
    if in_config is not None:
        written["chat_template"] = in_config
    config.write_text(json.dumps(written))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert usable(tokenizer.chat_template) is found
    assert template_in(tmp_path) is found


def test_a_folder_without_a_tokenizer_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert template_in(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert template_in(tmp_path) is False
