"""The prompt of a group is tokenized once for all rows of the group."""

from __future__ import annotations

from typing import Any

from toolkit.train.rollout.sampler import tokenize_distinct


class Tokenizer:
    """Replaces TRL's ``_tokenize_prompts``, and counts the prompts of each call."""

    def __init__(self, images: Any = None, fields: dict[str, Any] | None = None) -> None:
        self.images, self.fields = images, fields or {}
        self.seen: list[int] = []

    def __call__(self, prompts: list[Any]) -> Any:
        self.seen.append(len(prompts))
        return [[ord(letter) for letter in prompt] for prompt in prompts], self.images, self.fields


def test_each_row_gets_its_own_list_of_the_ids_of_its_prompt() -> None:
    tokenize = Tokenizer()
    ids, images, fields = tokenize_distinct(tokenize, ["ab", "ab", "c", "ab"])
    assert ids == [[97, 98], [97, 98], [99], [97, 98]]
    assert tokenize.seen == [3]  # only equal prompts of consecutive rows are one group
    assert (images, fields) == (None, {})
    ids[0].append(0)
    assert ids[1] == [97, 98]


def test_different_prompts_are_tokenized_in_one_call() -> None:
    tokenize = Tokenizer()
    assert tokenize_distinct(tokenize, ["a", "b"])[0] == [[97], [98]]
    assert tokenize.seen == [2]


def test_images_and_other_fields_need_every_row() -> None:
    for tokenize in (Tokenizer(images=[None]), Tokenizer(fields={"token_type_ids": [[0]]})):
        ids, images, fields = tokenize_distinct(tokenize, ["a", "a"])
        assert ids == [[97], [97]]
        assert tokenize.seen == [1, 2]
        assert (images, fields) == (tokenize.images, tokenize.fields)
