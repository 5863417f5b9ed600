"""The training forward over packs: every token once, no padding, a prompt once for its group.

TRL scores a padded batch: every row is as wide as the longest prompt and the longest completion.
Here the rows become one sequence (``policy.packed_attention``):

    prompt without its last token | last prompt token, completion 1 without its last token |
    last prompt token, completion 2 without its last token | next prompt ...

Each token of a completion segment predicts the completion token at its place, so the labels need
no shift, and the last token of a completion, which predicts nothing, is left out. The
log-probabilities come from TRL's fused head (``shift_labels``; read at TRL 1.16.0), which on a GPU
sees labelled positions alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.policy.packed_attention import KEYWORD, PackedLayout, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_LABEL = -100
BATCH = "packed_batch"
"""The keyword under which our own head (``sampled_head``) finds the rows that a pack is made of."""


class PaddedBatch(NamedTuple):
    """A padded batch in TRL's layout: ``ids_BL`` and ``real_BL`` (False on padding), with
    completions in the last ``width`` places; and the row and place of a pack's M labelled tokens.
    """

    ids_BL: torch.Tensor
    real_BL: torch.Tensor
    width: int
    rows_M: torch.Tensor
    places_M: torch.Tensor


class Row(NamedTuple):
    """One completion of a batch: its number in the batch, its prompt, and how long it is."""

    number: int
    prompt: tuple[int, ...]
    length: int


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows as one sequence. ``ids_N``, ``positions_N``, ``labels_N``: (N) on the device.
    ``places_M`` and ``targets_M``: where the M labelled tokens lie in the pack, and in the padded
    batch flattened to B * T.
    """

    layout: PackedLayout
    ids_N: torch.Tensor
    positions_N: torch.Tensor
    labels_N: torch.Tensor
    places_M: torch.Tensor
    targets_M: torch.Tensor


def read_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int
) -> list[Row]:
    """The rows of a padded batch in TRL's layout: prompts padded on the left, completions on the
    right. (B, P + T) both.
    """
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    lengths = mask[:, -logits_to_keep:].sum(1).tolist()
    rows = []
    for number, length in enumerate(lengths):
        real = mask[number, :-logits_to_keep]
        rows.append(Row(number, tuple(ids[number, :-logits_to_keep][real].tolist()), length))
    return rows


def tokens_of(rows: Sequence[Row]) -> int:
    """How many tokens the pack of ``rows`` has."""
    prompts = {row.prompt for row in rows if row.length}
    return sum(len(prompt) - 1 for prompt in prompts) + sum(row.length for row in rows)


def build_pack(
    rows: Sequence[Row], completions_BT: torch.Tensor, scored_BT: torch.Tensor
) -> Pack | None:
    """The pack of ``rows`` of a batch whose completions are ``completions_BT``; ``scored_BT`` is
    False where a token needs no log-probability. None where there is nothing to score.
    """
    groups: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.length:
            groups[row.prompt].append(row)
    if not groups:
        return None
    device, width = completions_BT.device, completions_BT.shape[1]
    host_BT, scored = completions_BT.cpu(), scored_BT.cpu()
    segments: list[Segment] = []
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    at = 0
    for prompt, members in groups.items():
        shared = len(prompt) - 1
        prefix = at
        segments.append(Segment(at, shared))
        ids.append(torch.tensor(prompt[:-1], dtype=torch.long))
        positions.append(torch.arange(shared))
        labels.append(torch.full((shared,), NO_LABEL))
        places.append(torch.full((shared,), -1))
        at += shared
        for row in members:
            completion = host_BT[row.number, : row.length]
            wanted = scored[row.number, : row.length].bool()
            segments.append(Segment(at, row.length, prefix, shared))
            ids.append(torch.cat([torch.tensor(prompt[-1:]), completion[:-1]]))
            positions.append(torch.arange(shared, shared + row.length))
            labels.append(completion.masked_fill(~wanted, NO_LABEL))
            target = torch.arange(row.number * width, row.number * width + row.length)
            places.append(target.masked_fill(~wanted, -1))
            at += row.length
    target_N = torch.cat(places)
    place_M = (target_N >= 0).nonzero().flatten()
    return Pack(
        PackedLayout(segments, device),
        torch.cat(ids).to(device),
        torch.cat(positions).to(device),
        torch.cat(labels).to(device),
        place_M.to(device),
        target_N[place_M].to(device),
    )


def forward(
    model: Any, pack: Pack, batch: tuple[torch.Tensor, torch.Tensor, int] | None = None
) -> Any:
    """The fused output of one pass over ``pack``: ``log_probs`` and ``entropy``, (1, N).

    ``batch`` (ids, mask, completion width) goes to our own head, where that is on the model
    (``sampled_head.scoring``); TRL's takes no notice of it.
    """
    ids = pack.ids_N.unsqueeze(0)
    own = {}
    if batch is not None:
        ids_BL, real_BL, width = batch
        rows_M, places_M = pack.targets_M // width, pack.targets_M % width
        places_M = places_M + ids_BL.shape[1] - width
        own = {BATCH: PaddedBatch(ids_BL, real_BL, width, rows_M, places_M)}
    return model(
        input_ids=ids,
        position_ids=pack.positions_N.unsqueeze(0),
        # transformers passes a mask of four dimensions on as it is and makes none of its own.
        attention_mask=ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
        shift_labels=pack.labels_N.unsqueeze(0),
        fused_lm_head=True,
        **{KEYWORD: pack.layout},
        **own,
    )


def scatter(values_1N: torch.Tensor, pack: Pack, shape: tuple[int, int]) -> torch.Tensor:
    """The labelled values of a pack in their places of the padded batch (B, T); 0 elsewhere."""
    flat = values_1N.new_zeros(shape[0] * shape[1])
    return flat.scatter(0, pack.targets_M, values_1N[0, pack.places_M]).view(shape)


def split_rows(rows: Sequence[Row], limit: int) -> list[list[Row]]:
    """``rows`` in as few packs of at most ``limit`` tokens as a simple rule finds, evenly filled.

    The groups of a prompt stay together; one that is larger than ``limit`` is cut. Units are placed
    longest first, each into the pack that holds least so far. Only lengths and the order of the
    rows decide, so that a resumed run splits in the same way. A row that is longer than ``limit``
    is a pack of its own.
    """
    number = max(1, -(-tokens_of(rows) // limit))
    while True:
        packs = even_packs(rows, number, limit)
        if number >= len(rows) or all(tokens_of(pack) <= limit for pack in packs):
            return [pack for pack in packs if pack]
        number += 1


def even_packs(rows: Sequence[Row], number: int, limit: int | None = None) -> list[list[Row]]:
    """``rows`` over exactly ``number`` packs, evenly filled; some are empty where there are fewer
    rows. A group of more than ``limit`` tokens, or of more than a pack's share, is cut.
    """
    share = max(1, -(-tokens_of(rows) // number))
    units = _units(rows, share if limit is None else min(limit, share))
    return [sorted(pack) for pack in _spread(units, number)]


def _units(rows: Sequence[Row], limit: int) -> list[list[Row]]:
    """Rows of one prompt, at most ``limit`` tokens each unless it is a single row."""
    groups: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.prompt].append(row)
    units: list[list[Row]] = []
    for members in groups.values():
        unit: list[Row] = []
        for row in sorted(members, key=lambda row: (-row.length, row.number)):
            if unit and tokens_of([*unit, row]) > limit:
                units.append(unit)
                unit = []
            unit.append(row)
        units.append(unit)
    return units


def _spread(units: list[list[Row]], number: int) -> list[list[Row]]:
    """Units over ``number`` packs, the longest first, each into the one that holds least."""
    while len(units) < number:  # fewer groups than packs: the longest is cut in two
        longest = max(units, key=lambda unit: (len(unit) > 1, tokens_of(unit)))
        if len(longest) < 2:
            break
        units.remove(longest)
        half = len(longest) // 2
        units += [longest[:half], longest[half:]]
    packs: list[list[Row]] = [[] for _ in range(number)]
    for unit in sorted(units, key=lambda unit: (-tokens_of(unit), unit[0].number)):
        min(packs, key=tokens_of).extend(unit)
    return packs
