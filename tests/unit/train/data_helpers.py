"""A small real tokenizer, with and without a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.index > 1 %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of its vocabulary, and <unk> for other words.

    With ``chat``, the tokenizer has a chat template. Without ``chat``, it adds <s> in front of
    each text.
    """
    words = [f"w{number}" for number in range(50)] + list(
        "abcdefghijklmnopqrstuvwxyz .,<>/0123456789"
    )
    special = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]
    vocabulary = {word: number for number, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not chat:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}
