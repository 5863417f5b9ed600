"""Pack the rows of a batch into one sequence, and run the forward pass of training over this pack.

TRL uses a padded batch, in which every row has the length of the longest prompt plus the longest
completion. A pack has no padding, and the prompt of a group is computed only once. All rows are
joined like this (``policy.packed_attention``):

    prompt without its last token | last prompt token, completion 1 without its last token |
    last prompt token, completion 2 without its last token | next prompt ...

The token at position i of a completion segment predicts completion token i, so the labels are not
shifted. The last token of a completion predicts nothing and is left out. TRL's fused head computes
the log-probabilities (argument ``shift_labels``, TRL 1.16.0). On a GPU, this head computes only
positions with a label.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.policy.packed_attention import LAYOUT_KEYWORD, PackedLayout, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

NO_LABEL = -100
BATCH_KEYWORD = "packed_batch"
"""The keyword argument that passes the padded batch of a pack to ``sampled_head``."""


class PaddedBatch(NamedTuple):
    """A padded batch in TRL's layout, and the location of a pack's M labelled tokens in it.

    ``ids_BL`` are the tokens, and ``real_BL`` is False on padding. The completions are in the last
    ``width`` positions. ``rows_M`` and ``positions_M`` are the rows and the positions of the
    labelled tokens.
    """

    ids_BL: torch.Tensor
    real_BL: torch.Tensor
    width: int
    rows_M: torch.Tensor
    positions_M: torch.Tensor


class Row(NamedTuple):
    """One completion of a batch: its index in the batch, its prompt, and its length in tokens."""

    number: int
    prompt: tuple[int, ...]
    length: int


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows joined into one sequence of N tokens.

    ``ids_N``, ``positions_N`` and ``labels_N`` have the shape (N) and are on the device.
    ``indices_M`` are the indices of the M labelled tokens in the pack. ``targets_M`` are the
    indices of the same tokens in the padded completions (B, T), after these are flattened to B * T.
    """

    layout: PackedLayout
    ids_N: torch.Tensor
    positions_N: torch.Tensor
    labels_N: torch.Tensor
    indices_M: torch.Tensor
    targets_M: torch.Tensor


def read_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int
) -> list[Row]:
    """The rows of a padded batch in TRL's layout, in which prompts are padded on the left and
    completions on the right.

    ``input_ids`` and ``attention_mask`` have the shape (B, P + T). ``logits_to_keep`` is T, the
    width of the completions.
    """
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    lengths = mask[:, -logits_to_keep:].sum(1).tolist()
    rows = []
    for number, length in enumerate(lengths):
        real = mask[number, :-logits_to_keep]
        rows.append(Row(number, tuple(ids[number, :-logits_to_keep][real].tolist()), length))
    return rows


def count_pack_tokens(rows: Sequence[Row]) -> int:
    """The number of tokens in the pack of ``rows``."""
    prompts = {row.prompt for row in rows if row.length}
    return sum(len(prompt) - 1 for prompt in prompts) + sum(row.length for row in rows)


def build_pack(
    rows: Sequence[Row], completions_BT: torch.Tensor, scored_BT: torch.Tensor
) -> Pack | None:
    """Join ``rows`` of a batch into a pack. Returns None if all rows are empty.

    ``completions_BT`` are the completions of the batch. ``scored_BT`` is False for tokens that need
    no log-probability.
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
    targets: list[torch.Tensor] = []
    position = 0
    for prompt, group in groups.items():
        shared_tokens = len(prompt) - 1
        prompt_start = position
        segments.append(Segment(position, shared_tokens))
        ids.append(torch.tensor(prompt[:-1], dtype=torch.long))
        positions.append(torch.arange(shared_tokens))
        labels.append(torch.full((shared_tokens,), NO_LABEL))
        targets.append(torch.full((shared_tokens,), -1))
        position += shared_tokens
        for row in group:
            completion = host_BT[row.number, : row.length]
            is_scored = scored[row.number, : row.length].bool()
            segments.append(Segment(position, row.length, prompt_start, shared_tokens))
            ids.append(torch.cat([torch.tensor(prompt[-1:]), completion[:-1]]))
            positions.append(torch.arange(shared_tokens, shared_tokens + row.length))
            labels.append(completion.masked_fill(~is_scored, NO_LABEL))
            target = torch.arange(row.number * width, row.number * width + row.length)
            targets.append(target.masked_fill(~is_scored, -1))
            position += row.length
    target_N = torch.cat(targets)
    index_M = (target_N >= 0).nonzero().flatten()
    return Pack(
        PackedLayout(segments, device),
        torch.cat(ids).to(device),
        torch.cat(positions).to(device),
        torch.cat(labels).to(device),
        index_M.to(device),
        target_N[index_M].to(device),
    )


def forward_pack(
    model: PreTrainedModel, pack: Pack, batch: tuple[torch.Tensor, torch.Tensor, int] | None = None
) -> Any:
    """Run one pass over ``pack``, and return the output of the head: ``log_probs`` and ``entropy``,
    (1, N).

    ``batch`` is (ids, mask, completion width). It is needed only if ``sampled_head_installed`` has
    replaced the head of the model.
    """
    ids = pack.ids_N.unsqueeze(0)
    head_argument = {}
    if batch is not None:
        ids_BL, real_BL, width = batch
        rows_M, positions_M = pack.targets_M // width, pack.targets_M % width
        positions_M = positions_M + ids_BL.shape[1] - width
        head_argument = {BATCH_KEYWORD: PaddedBatch(ids_BL, real_BL, width, rows_M, positions_M)}
    return model(
        input_ids=ids,
        position_ids=pack.positions_N.unsqueeze(0),
        # transformers uses a mask with four dimensions as it is, and does not create its own.
        attention_mask=ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
        shift_labels=pack.labels_N.unsqueeze(0),
        fused_lm_head=True,
        **{LAYOUT_KEYWORD: pack.layout},
        **head_argument,
    )


def scatter_to_padded(values_1N: torch.Tensor, pack: Pack, shape: tuple[int, int]) -> torch.Tensor:
    """Copy the values of the pack's labelled tokens into the padded layout (B, T). All other values
    are 0.
    """
    flat = values_1N.new_zeros(shape[0] * shape[1])
    return flat.scatter(0, pack.targets_M, values_1N[0, pack.indices_M]).view(shape)


def split_rows(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Distribute ``rows`` over a small number of evenly filled packs of at most ``max_tokens``
    tokens.

    Rows of one prompt (a group) stay together, but a group larger than ``max_tokens`` is split. A
    row longer than ``max_tokens`` is a pack of its own. Groups are placed in order of their length,
    the longest first, each into the pack with the fewest tokens. The result depends only on the
    lengths and the order of the rows. Therefore a resumed run gets the same packs.
    """
    pack_count = max(1, -(-count_pack_tokens(rows) // max_tokens))
    while True:
        packs = even_packs(rows, pack_count, max_tokens)
        if pack_count >= len(rows) or all(count_pack_tokens(pack) <= max_tokens for pack in packs):
            return [pack for pack in packs if pack]
        pack_count += 1


def even_packs(
    rows: Sequence[Row], pack_count: int, max_tokens: int | None = None
) -> list[list[Row]]:
    """Distribute ``rows`` over exactly ``pack_count`` evenly filled packs.

    If there are fewer rows than packs, some packs are empty. Rows of one prompt are put into the
    same pack, except in two cases. In the first case, these rows have more than ``max_tokens``
    tokens, or more tokens than the average pack. In the second case, there are fewer prompts than
    packs.
    """
    tokens_per_pack = max(1, -(-count_pack_tokens(rows) // pack_count))
    units = _same_prompt_units(
        rows, tokens_per_pack if max_tokens is None else min(max_tokens, tokens_per_pack)
    )
    return [sorted(pack) for pack in _distribute_units(units, pack_count)]


def _same_prompt_units(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Split ``rows`` into units of rows with the same prompt. A unit has at most ``max_tokens``
    tokens, unless it is a single row.
    """
    groups: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.prompt].append(row)
    units: list[list[Row]] = []
    for group in groups.values():
        unit: list[Row] = []
        for row in sorted(group, key=lambda row: (-row.length, row.number)):
            if unit and count_pack_tokens([*unit, row]) > max_tokens:
                units.append(unit)
                unit = []
            unit.append(row)
        units.append(unit)
    return units


def _distribute_units(units: list[list[Row]], pack_count: int) -> list[list[Row]]:
    """Distribute units (rows with the same prompt) over ``pack_count`` packs. The longest unit
    comes first, and each unit is put into the pack with the fewest tokens.
    """
    while len(units) < pack_count:  # with fewer units than packs, split the longest unit in two
        longest = max(units, key=lambda unit: (len(unit) > 1, count_pack_tokens(unit)))
        if len(longest) < 2:
            break
        units.remove(longest)
        half = len(longest) // 2
        units += [longest[:half], longest[half:]]
    packs: list[list[Row]] = [[] for _ in range(pack_count)]
    for unit in sorted(units, key=lambda unit: (-count_pack_tokens(unit), unit[0].number)):
        min(packs, key=count_pack_tokens).extend(unit)
    return packs
