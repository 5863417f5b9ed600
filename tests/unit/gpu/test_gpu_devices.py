"""The NVML device for each CUDA device number: forms of CUDA_VISIBLE_DEVICES, the order of the
cards, MIG slices and memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cases
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.base.errors import ConfigError
from toolkit.gpu import cards
from toolkit.gpu.devices import cuda_memory, cuda_order, parent_card, select_device, visible_devices
from toolkit.gpu.snapshot_json import node_from_json

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot


def recorded_node(name: str, **environment: str) -> NodeSnapshot:
    return replace(node_from_json(cases.load(name).node), environment=environment)


@pytest.mark.parametrize(
    ("value", "expected", "stops"),
    [
        ("0", [0], False),
        ("3,1", [3, 1], False),
        (" 2 , 5 ", [2, 5], False),
        ("0,8,1", [0], True),
        ("-1", [], True),
        ("", [], True),
        ("1,1", [], True),
        ("GPU-00000013", [3], False),
        ("gpu-00000011-5A3C", [1], False),
        ("GPU-0000001", [], True),  # all eight UUIDs begin with this prefix
        ("GPU-ffffffff", [], True),
        ("NoDevFiles", [], True),
        ("0;1", [], True),
        ("٣", [], True),  # a digit of another script is not an index
    ],
)
def test_visible_devices(value: str, expected: list[int], stops: bool) -> None:
    seen = visible_devices(recorded_node("h100x8-healthy", CUDA_VISIBLE_DEVICES=value))
    assert [gpu.index for gpu in seen.devices] == expected
    assert bool(seen.problem) is stops


@given(st.text(alphabet="0123456789,- GPUMIgpumi/ab", max_size=40))
def test_any_setting_gives_distinct_cards_or_a_reason(value: str) -> None:
    seen = visible_devices(recorded_node("h100x8-healthy", CUDA_VISIBLE_DEVICES=value))
    indices = [gpu.index for gpu in seen.devices]
    assert len(set(indices)) == len(indices) <= 8
    assert indices or seen.problem


def test_lost_cards_are_not_counted_by_cuda() -> None:
    snapshot = recorded_node("h100x8-lost")
    assert [gpu.index for gpu in cuda_order(snapshot)] == [0, 1, 2, 3, 4, 6, 7]
    chosen = select_device(snapshot, 5)
    assert chosen is not None
    assert chosen.index == 6


def test_equal_cards_keep_the_bus_order_and_different_cards_are_sorted_by_speed() -> None:
    assert [gpu.index for gpu in cuda_order(recorded_node("mixed-cards"))] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        0,
    ]
    by_bus = recorded_node("mixed-cards", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert [gpu.index for gpu in cuda_order(by_bus)] == list(range(8))


@pytest.mark.parametrize(
    ("value", "index"),
    [
        (None, 0),
        ("0", 0),
        ("MIG-f39aa248-6f1b-5769-b119-8d650bb34b27", 1),
        ("MIG-f39aa248", 1),
        ("MIG-GPU-00000010-5a3c-41d7-9e0b-00000001eefb/5/0", 1),
    ],
)
def test_a_slice_can_be_selected_by_its_names(value: str | None, index: int) -> None:
    snapshot = recorded_node(
        "h200-mig", **({} if value is None else {"CUDA_VISIBLE_DEVICES": value})
    )
    part = select_device(snapshot)
    assert part is not None
    assert (part.parent, part.index) == (0, index)
    memory = cuda_memory(snapshot, part)
    assert memory is not None
    assert memory.total_bytes == [71424 << 20, 16384 << 20][index]
    assert parent_card(snapshot, part).total_bytes == 143771 << 20


def test_selecting_without_a_gpu_and_beyond_the_last_gpu() -> None:
    assert select_device(recorded_node("cpu")) is None
    assert select_device(recorded_node("cpu"), 3) is None
    hidden = recorded_node("h100x8-healthy", CUDA_VISIBLE_DEVICES="")
    assert select_device(hidden) is None
    assert select_device(hidden, 0) is None
    with pytest.raises(ConfigError, match="CUDA sees 2 on this node"):
        select_device(recorded_node("h100x8-healthy", CUDA_VISIBLE_DEVICES="4,5"), 2)


def test_integrated_memory_is_the_memory_of_the_host() -> None:
    snapshot = recorded_node("gb10")
    memory = cuda_memory(snapshot, snapshot.gpus[0])
    assert memory is not None
    assert memory.integrated
    assert memory.free_bytes == 118566368 * 1024
    failed = recorded_node("h200-memory-failed")
    assert cuda_memory(failed, failed.gpus[0]) is None


@pytest.mark.parametrize(
    ("name", "mib", "capability"),
    [
        ("h200", 143771, (9, 0)),
        ("NVIDIA H200", 143771, (9, 0)),
        ("H100", 81559, (9, 0)),
        ("nvidia_h100_80gb_hbm3", 81559, (9, 0)),
        ("RTX 4090", 24564, (8, 9)),
        ("t4", 15360, (7, 5)),
        ("a100:3g.40gb", 40192, (8, 0)),
        ("a100:7g.80gb", 80896, (8, 0)),
        ("a30:1g.6gb", 5949, (8, 0)),
    ],
)
def test_a_card_is_found_by_any_usual_name(
    name: str, mib: int, capability: tuple[int, int]
) -> None:
    card = cards.find_card(name)
    assert card.total_bytes == mib << 20
    assert card.compute_capability == capability


@pytest.mark.parametrize(
    ("name", "hint"),
    [("h20o", "h200"), ("a100:9g.1gb", "3g.40gb"), ("t4:1g.5gb", "no MIG"), ("", "known cards")],
)
def test_an_unknown_card_suggests_similar_ones(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cards.find_card(name)
    assert hint in str(caught.value)


def test_every_card_is_found_by_each_of_its_names() -> None:
    for card in cards.CARDS:
        assert all(cards.find_card(alias) is card for alias in (card.name, *card.aliases))
        sizes: list[Any] = [cards.find_card(f"{card.aliases[0]}:{p}") for p in card.mig_profiles]
        assert all(part.total_bytes <= card.total_bytes for part in sizes)
