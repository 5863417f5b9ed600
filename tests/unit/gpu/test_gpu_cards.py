"""The table of cards and slices, cards given as a memory size, devices of other makers, and
families of cards.
"""

from __future__ import annotations

import pytest

from toolkit.base.capability import build_problem, torch_capabilities, vllm_capabilities
from toolkit.base.errors import ConfigError
from toolkit.base.formatting import GIB, MIB
from toolkit.gpu import card_sources, card_table, cards
from toolkit.sizing import Device

SOURCES = {"read", "log", "reserved", "reported", "alike", "computed", "host"}


def test_the_table_has_cards_and_slices_each_with_its_source() -> None:
    assert len(cards.CARDS) >= 60
    assert {card.source for card in cards.CARDS} == SOURCES
    published = {
        (card.name, profile)
        for card in cards.CARDS
        for profile, _, source in card.slices
        if source == "lgip"
    }
    assert len(published) >= 25
    for card in cards.CARDS:
        kept = card.total_bytes - card.cuda_bytes
        least = -MIB if card.source == "host" else 1  # rounding of GiB to two decimals
        assert least <= kept < 0.02 * card.total_bytes + 520 * MIB, card.name
        for profile, size, _ in card.slices:
            named = float(profile.split(".")[1].removesuffix("gb"))
            assert 0.85 * named < size / GIB <= named, (card.name, profile)


def test_a_size_from_a_log_has_its_address() -> None:
    """Each family of slices also has its address. Each address belongs to a card in the table."""
    for card in cards.CARDS:
        if card.source in {"read", "log", "reserved"}:
            assert card.addresses, card.name
        assert all(address.startswith("https://") for address in card.addresses)
        assert bool(card.slices) == bool(card.slice_addresses), card.name
    assert set(card_sources.ADDRESSES) <= {card.aliases[0] for card in cards.CARDS}
    assert set(card_sources.SLICE_ADDRESSES) == set(card_table.SLICES)
    assert sum(card.source == "reported" for card in cards.CARDS) <= 16


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("t4", 14.56), ("l4", 22.03), ("3090", 23.56), ("4090", 23.52), ("5090", 31.36),
        ("h100", 79.19), ("b200", 178.35), ("gb200", 184.31), ("h200:1g.18gb", 16.0),
        ("h100-nvl:1g.12gb", 10.75), ("gh200:3g.48gb", 46.5), ("rtx-pro-6000:2g.48gb", 47.375),
        ("h200:7g.141gb", 139.75), ("b200:2g.45gb", 44.25), ("gb200:1g.47gb", 45.5),
        ("gh200-144:1g.18gb", 17.5), ("a2000", 11.53), ("2080-super", 7.60),
        ("24GiB", 24.0), ("16384MiB", 16.0), ("24 GB:8.9", 24.0),
    ],
)  # fmt: skip
def test_the_size_that_cuda_reports(name: str, gib: float) -> None:
    device = Device.from_card(cards.find_card(name))
    assert device.cuda_total_bytes / GIB == pytest.approx(gib, abs=0.01)
    assert device.free_bytes == device.cuda_total_bytes


def test_a_memory_size_may_state_the_capability() -> None:
    assert cards.find_card("24GiB:8.9").compute_capability == (8, 9)
    assert "assumed capability 8.0" in cards.find_card("24GiB").name


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("mi300x", "AMD"), ("Radeon RX 7900 XTX", "AMD"), ("gfx942", "AMD"), ("rx7900xt", "AMD"),
        ("arc-b580", "Intel"), ("gaudi3", "Intel"), ("m3-max", "Apple"), ("mps", "Apple"),
    ],
)  # fmt: skip
def test_a_card_of_another_vendor_is_refused_by_name(name: str, maker: str) -> None:
    with pytest.raises(
        ConfigError, match=f"a device of {maker}, but this toolkit supports only NVIDIA"
    ):
        cards.find_card(name)


@pytest.mark.parametrize(
    ("wanted", "name", "capability", "fits"),
    [
        ("h100", "NVIDIA H100 NVL", (9, 0), True),
        ("h100", "NVIDIA H100 80GB HBM3", (9, 0), True),
        ("a100-80", "NVIDIA A100 80GB PCIe", (8, 0), True),
        ("a100-80gb", "NVIDIA A100-SXM4-40GB", (8, 0), False),
        ("b200", "NVIDIA GB200", (10, 0), False),
        ("hopper", "NVIDIA GH200 480GB", (9, 0), True),
        ("hopper", "NVIDIA A100-SXM4-40GB", (8, 0), False),
        ("rtx-40", "NVIDIA GeForce RTX 4070 Ti SUPER", (8, 9), True),
        ("40", "NVIDIA GeForce RTX 5090", (12, 0), False),
        ("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", (12, 0), True),
        ("h100-sxm", "NVIDIA H100 80GB HBM3", (9, 0), True),
        ("h100-sxm", "NVIDIA H100 PCIe", (9, 0), False),
    ],
)
def test_a_requirement_matches_a_family_of_cards(
    wanted: str, name: str, capability: tuple[int, int], fits: bool
) -> None:
    cards.check_card_requirement(wanted)
    assert cards.card_matches(wanted, name, capability) is fits


def test_an_unknown_family_suggests_similar_ones() -> None:
    with pytest.raises(ConfigError, match="unknown card 'h10o'"):
        cards.check_card_requirement("h10o")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("v100", "at least 7.5"), ("p100", "at least 7.5"), ("t4g", "aarch64 needs at least 8"),
        ("t4", None), ("thor", None), ("gb10", None), ("orin", None), ("b300", None),
        ("gh200", None), ("5090", None),
    ],
)  # fmt: skip
def test_the_locked_builds_support_a_card(card: str, expected: str | None) -> None:
    """For Thor and T4G, the capabilities of the aarch64 builds count."""
    found = cards.find_card(card)
    problem = build_problem(found.compute_capability, machine=found.machine)
    assert (problem is None) if expected is None else expected in str(problem)


def test_thor_on_x86_64_and_a_card_without_vllm_use_the_list_of_torch() -> None:
    assert "11.0: torch for CUDA 13.0 on x86_64 supports 7.5, 8.0" in str(
        build_problem((11, 0), machine="x86_64")
    )
    problem = str(build_problem((7, 5), machine="aarch64", vllm=False))
    assert "on aarch64 supports 8.0, 9.0" in problem
    assert torch_capabilities("99.0", "x86_64") is None
    assert build_problem((9, 0), machine="x86_64", cuda="99.0") is None


def test_the_list_of_vllm_depends_on_its_cuda_version() -> None:
    """vLLM's CUDA 12.9 build for aarch64 has no code for Thor. A V100 runs with older builds."""
    problem = str(build_problem((11, 0), machine="aarch64", cuda="12.9"))
    assert "vLLM for CUDA 12.9 on aarch64 supports 8.0, 8.7" in problem
    assert build_problem((11, 0), machine="aarch64", cuda="12.9", vllm=False) is None
    assert build_problem((11, 0), machine="aarch64") is None
    assert "vLLM for CUDA 12.9 needs at least 7.5" in str(
        build_problem((7, 0), machine="x86_64", cuda="12.9")
    )
    assert build_problem((7, 0), machine="x86_64", cuda="12.8") is None
    assert vllm_capabilities("12.8", "x86_64") is None
