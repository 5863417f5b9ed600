"""A reward of one's own."""


def mentions(completions, must_contain, log_extra=None, **columns):
    """The share of the words in ``must_contain`` that a completion has, from 0 to 1."""
    shares = []
    for completion, words in zip(completions, must_contain, strict=True):
        text = (completion if isinstance(completion, str) else completion[-1]["content"]).lower()
        shares.append(sum(word in text for word in words) / len(words))
    if log_extra is not None:
        log_extra("share", shares)
    return shares
