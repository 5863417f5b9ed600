"""The distribution of sampled tokens equals that of the logits processors of transformers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from toolkit.train.step.kept_set import (
    Distribution,
    TokenHistory,
    TokenPositions,
    kept_mask,
    score_tokens,
)

ROWS, LENGTH, VOCAB, START = 3, 12, 40, 4


def make_case(seed: int = 0) -> tuple[torch.Tensor, TokenHistory, TokenPositions, torch.Tensor]:
    """Return ids, history, the positions of all completion tokens, and logits at these positions.
    Row 0 has padding on both sides.
    """
    torch.manual_seed(seed)
    ids = torch.randint(0, 12, (ROWS, LENGTH))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, :2] = real[0, -3:] = False
    history = TokenHistory(ids, real, torch.full((ROWS,), START), VOCAB)
    scores = real.clone()
    scores[:, :START] = False
    rows, positions = scores.nonzero(as_tuple=True)
    return ids, history, TokenPositions(history, rows, positions), torch.randn(len(rows), VOCAB) * 3


def tokens_at(ids: torch.Tensor, positions: TokenPositions) -> torch.Tensor:
    return ids[positions.rows_N, positions.positions_N]


GRID = [
    {"temperature": t, "top_p": p, "top_k": k, "min_p": m}
    for t, p, k, m in product((1.0, 0.7), (1.0, 0.8), (0, 6), (0.0, 0.05))
]


@pytest.mark.parametrize("options", GRID, ids=str)
def test_scores_equal_those_of_transformers_warpers(options: dict[str, Any]) -> None:
    _, _, _, logits = make_case()
    logits = logits.requires_grad_()
    warpers = [TemperatureLogitsWarper(options["temperature"])]
    if options["top_k"]:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    warpers += [TopPLogitsWarper(options["top_p"]), MinPLogitsWarper(options["min_p"])]
    expected_logits = logits
    for warper in warpers:
        expected_logits = warper(None, expected_logits)
    best = expected_logits.argmax(-1)
    scores = score_tokens(logits, best, Distribution(**options, min_p_first=False))
    expected_logps = torch.log_softmax(expected_logits, -1)
    torch.testing.assert_close(scores.logps, expected_logps.gather(1, best[:, None])[:, 0])
    p = expected_logps.exp()
    torch.testing.assert_close(scores.entropy, torch.special.entr(p).sum(-1), atol=1e-6, rtol=1e-5)
    gradients = [
        torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
        for value in (scores.logps, expected_logps.gather(1, best[:, None]))
    ]
    torch.testing.assert_close(*gradients)
    entropy = torch.autograd.grad(scores.entropy.sum(), logits)[0]
    assert bool(entropy.isfinite().all())
    assert bool((entropy[p == 0] == 0).all())


def test_min_p_is_applied_in_the_order_of_the_engine() -> None:
    """Engines apply min-p before or after top-p. The second filter uses the probabilities among the
    tokens that the first filter kept.
    """
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.15]]).log()
    before = Distribution(top_p=0.7, min_p=0.35)
    # Min-p keeps 0.5 and 0.2. Top-p keeps only the first, which is 0.71 of their sum.
    assert kept_mask(logits, before).tolist() == [[True, False, False, False]]
    # Top-p keeps the first two tokens. Min-p keeps both.
    after = Distribution(top_p=0.7, min_p=0.35, min_p_first=False)
    assert kept_mask(logits, after).tolist() == [[True, True, False, False]]


def test_penalties_use_only_earlier_tokens() -> None:
    ids, _, positions, logits = make_case()
    distribution = Distribution(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2
    )
    scores = score_tokens(logits, tokens_at(ids, positions), distribution, positions)
    for n, (row, position) in enumerate(zip(*positions[1:], strict=True)):
        begin = 2 if row == 0 else 0
        before, drawn = ids[row : row + 1, begin:position], ids[row, START:position]
        expected_logits = RepetitionPenaltyLogitsProcessor(1.3)(before, logits[n : n + 1])[0]
        for token in drawn.tolist():
            expected_logits[token] += 0.2
        for token in set(drawn.tolist()):
            expected_logits[token] -= 0.4
        expected = torch.log_softmax(expected_logits, -1)[ids[row, position]]
        torch.testing.assert_close(scores.logps[n], expected)


@pytest.mark.parametrize("size", [1, 5])
def test_splitting_into_chunks_does_not_change_scores(size: int) -> None:
    ids, history, positions, logits = make_case()
    distribution = Distribution(
        top_p=0.8, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3
    )
    tokens = tokens_at(ids, positions)
    all_scores = score_tokens(logits, tokens, distribution, positions)
    chunks = zip(*(x.split(size) for x in (logits, tokens, *positions[1:])), strict=True)
    parts = [
        score_tokens(some, t, distribution, TokenPositions(history, r, p))
        for some, t, r, p in chunks
    ]
    torch.testing.assert_close(torch.cat([one.logps for one in parts]), all_scores.logps)
    torch.testing.assert_close(torch.cat([one.entropy for one in parts]), all_scores.entropy)


def test_a_sampled_token_outside_the_set_counts_as_kept() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -4.0]], requires_grad=True)
    scores = score_tokens(logits, torch.tensor([3]), Distribution(top_k=2))
    expected = torch.log_softmax(torch.tensor([3.0, 2.0, -4.0]), -1)[2]
    torch.testing.assert_close(scores.logps[0], expected)
    (scores.logps + scores.entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].isfinite().all()
    assert logits.grad[0, 2] == 0


def test_without_truncation_the_distribution_is_the_softmax() -> None:
    _, _, _, logits = make_case()
    tokens = torch.arange(len(logits))
    for distribution in (Distribution(), Distribution(top_k=-1), Distribution(top_k=VOCAB * 2)):
        plain = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(score_tokens(logits, tokens, distribution).logps, plain)
    assert Distribution(temperature=0.3, top_k=-1).is_plain
    assert not Distribution(repetition_penalty=1.1).is_plain
    with pytest.raises(ValueError, match="penalties depend on earlier tokens"):
        score_tokens(logits, tokens, Distribution(presence_penalty=1.0))


def test_bfloat16_logits_are_scored_in_float32() -> None:
    _, _, _, logits = make_case()
    tokens = logits.argmax(-1)
    bfloat16_scores = score_tokens(logits.bfloat16(), tokens, Distribution(top_p=0.9))
    assert bfloat16_scores.logps.dtype == bfloat16_scores.entropy.dtype == torch.float32
    float32_scores = score_tokens(logits.bfloat16().float(), tokens, Distribution(top_p=0.9))
    torch.testing.assert_close(bfloat16_scores.logps, float32_scores.logps)
