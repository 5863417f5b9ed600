"""transformers 5.17 finds a chat template where ``config.chat_format`` looks for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from toolkit.config.chat_format import folder_has_template, is_usable_template

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = [{"name": "default", "template": TEXT}, {"name": "tool_use", "template": TEXT}]


@pytest.mark.parametrize(
    ("in_config", "files", "expected"),
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
def test_template_in_agrees_with_the_tokenizer(
    tmp_path: Path, in_config: Any, files: dict[str, str], expected: bool
) -> None:
    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>").save_pretrained(
        tmp_path
    )
    config_file = tmp_path / "tokenizer_config.json"
    tokenizer_config = json.loads(config_file.read_text())
    if in_config is not None:
        tokenizer_config["chat_template"] = in_config
    config_file.write_text(json.dumps(tokenizer_config))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert is_usable_template(tokenizer.chat_template) is expected
    assert folder_has_template(tmp_path) is expected


def test_a_folder_without_tokenizer_files_gives_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert folder_has_template(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert folder_has_template(tmp_path) is False
