"""Cards that may not be here: what ``--gpu h200`` stands for.

``total_bytes`` is what NVML reports (``nvidia-smi``'s MiB), which is below the advertised size.
The H200 and the H100 SXM were read on the cards; the others are what ``nvidia-smi`` prints in
public logs. Bandwidth and MIG profiles are from NVIDIA's data sheets and its MIG guide.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from toolkit.base.errors import ConfigError
from toolkit.base.units import MIB


@dataclass(frozen=True, slots=True)
class Card:
    """One model of card, or one MIG slice of it."""

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    bandwidth_bytes_per_s: float
    mig_profiles: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    measured: bool = False  # read by us on the card, not from a published log


_MIG_A100_40 = ("1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb")
_MIG_80 = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")
_MIG_94 = ("1g.12gb", "1g.24gb", "2g.24gb", "3g.47gb", "4g.47gb", "7g.94gb")
_MIG_141 = ("1g.18gb", "1g.35gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb")
_MIG_B200 = ("1g.23gb", "1g.45gb", "2g.45gb", "3g.90gb", "4g.90gb", "7g.180gb")
_MIG_A30 = ("1g.6gb", "2g.12gb", "4g.24gb")

# (name, MiB as NVML reports, compute capability, GB/s, MIG profiles, other names)
_ROWS: tuple[tuple[str, int, tuple[int, int], float, tuple[str, ...], tuple[str, ...]], ...] = (
    ("NVIDIA B200", 183359, (10, 0), 8000, _MIG_B200, ("b200",)),
    ("NVIDIA GB200", 189471, (10, 0), 8000, _MIG_B200, ("gb200",)),
    ("NVIDIA H200", 143771, (9, 0), 4800, _MIG_141, ("h200", "h200-sxm")),
    ("NVIDIA H200 NVL", 143771, (9, 0), 4800, _MIG_141, ("h200-nvl",)),
    ("NVIDIA GH200 480GB", 97871, (9, 0), 4000, _MIG_94, ("gh200",)),
    ("NVIDIA H100 80GB HBM3", 81559, (9, 0), 3350, _MIG_80, ("h100", "h100-sxm")),
    ("NVIDIA H100 PCIe", 81559, (9, 0), 2000, _MIG_80, ("h100-pcie",)),
    ("NVIDIA H100 NVL", 95830, (9, 0), 3900, _MIG_94, ("h100-nvl",)),
    ("NVIDIA H20", 97871, (9, 0), 4000, _MIG_94, ("h20",)),
    ("NVIDIA A100-SXM4-80GB", 81920, (8, 0), 2039, _MIG_80, ("a100", "a100-80", "a100-80gb")),
    ("NVIDIA A100 80GB PCIe", 81920, (8, 0), 1935, _MIG_80, ("a100-80-pcie",)),
    ("NVIDIA A100-SXM4-40GB", 40960, (8, 0), 1555, _MIG_A100_40, ("a100-40", "a100-40gb")),
    ("NVIDIA A100-PCIE-40GB", 40960, (8, 0), 1555, _MIG_A100_40, ("a100-40-pcie",)),
    ("NVIDIA A30", 24576, (8, 0), 933, _MIG_A30, ("a30",)),
    ("NVIDIA A40", 46068, (8, 6), 696, (), ("a40",)),
    ("NVIDIA A10", 23028, (8, 6), 600, (), ("a10",)),
    ("NVIDIA A10G", 23028, (8, 6), 600, (), ("a10g",)),
    ("NVIDIA RTX A6000", 49140, (8, 6), 768, (), ("a6000", "rtx-a6000")),
    ("NVIDIA RTX A5000", 24564, (8, 6), 768, (), ("a5000", "rtx-a5000")),
    ("NVIDIA L40S", 46068, (8, 9), 864, (), ("l40s",)),
    ("NVIDIA L40", 46068, (8, 9), 864, (), ("l40",)),
    ("NVIDIA L4", 23034, (8, 9), 300, (), ("l4",)),
    ("NVIDIA RTX 6000 Ada Generation", 49140, (8, 9), 960, (), ("6000-ada", "rtx-6000-ada")),
    ("NVIDIA GeForce RTX 4090", 24564, (8, 9), 1008, (), ("4090", "rtx-4090")),
    ("NVIDIA GeForce RTX 4080", 16376, (8, 9), 717, (), ("4080", "rtx-4080")),
    ("NVIDIA GeForce RTX 3090", 24576, (8, 6), 936, (), ("3090", "rtx-3090")),
    ("NVIDIA GeForce RTX 3080", 10240, (8, 6), 760, (), ("3080", "rtx-3080")),
    ("NVIDIA GeForce RTX 3060", 12288, (8, 6), 360, (), ("3060", "rtx-3060")),
    ("NVIDIA GeForce RTX 5090", 32607, (12, 0), 1792, (), ("5090", "rtx-5090")),
    (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        97887,
        (12, 0),
        1597,
        ("1g.24gb", "2g.48gb", "4g.96gb"),
        ("rtx-pro-6000", "pro-6000"),
    ),
    ("Tesla V100-SXM2-32GB", 32768, (7, 0), 900, (), ("v100", "v100-32", "v100-32gb")),
    ("Tesla V100-SXM2-16GB", 16384, (7, 0), 900, (), ("v100-16", "v100-16gb")),
    ("Tesla T4", 15360, (7, 5), 320, (), ("t4",)),
    ("Tesla P100-PCIE-16GB", 16384, (6, 0), 732, (), ("p100",)),
)
_MEASURED = {"NVIDIA H200", "NVIDIA H100 80GB HBM3"}

CARDS: tuple[Card, ...] = tuple(
    Card(name, mib * MIB, capability, gb_per_s * 1e9, profiles, aliases, name in _MEASURED)
    for name, mib, capability, gb_per_s, profiles, aliases in _ROWS
)


def _key(name: str) -> str:
    """``NVIDIA GeForce RTX 4090``, ``rtx_4090`` and ``RTX4090`` are one name."""
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9.]", "", name.lower())


_BY_KEY = {_key(alias): card for card in CARDS for alias in (card.name, *card.aliases)}


def find(name: str, *, where: str = "--gpu") -> Card:
    """The card of that name, alias or ``CARD:PROFILE`` (``h100:3g.40gb``, a MIG slice).

    A slice's memory is taken as its profile's share of the card (what NVML reports for one is some
    tens of MiB less).

    Raises:
        ConfigError: at ``where``, no such card or profile; the fix names the nearest.
    """
    base, _, profile = name.partition(":")
    card = _BY_KEY.get(_key(base))
    if card is None:
        near = difflib.get_close_matches(_key(base), _BY_KEY, n=3, cutoff=0.4)
        hint = ", ".join(dict.fromkeys(_BY_KEY[key].aliases[0] for key in near))
        known = ", ".join(card.aliases[0] for card in CARDS)
        fix = f"did you mean {hint}? Known: {known}" if hint else f"known cards: {known}"
        raise ConfigError(f"no card named {base!r} in the table", where=where, fix=fix)
    return _slice(card, profile.lower().removeprefix("mig"), where) if profile else card


def _slice(card: Card, profile: str, where: str) -> Card:
    if profile not in card.mig_profiles:
        known = ", ".join(card.mig_profiles) or "none: this card has no MIG"
        raise ConfigError(
            f"{card.name} has no MIG profile {profile!r}", where=where, fix=f"profiles: {known}"
        )
    size_gb = int(profile.split(".")[1].removesuffix("gb"))
    whole_gb = int(card.mig_profiles[-1].split(".")[1].removesuffix("gb"))
    # Profiles are whole eighths (a quarter on the A30) of the memory, and their names are rounded.
    eighths = max(1, round(8 * size_gb / whole_gb))
    return Card(
        f"{card.name} MIG {profile}",
        card.total_bytes * eighths // 8 // MIB * MIB,
        card.compute_capability,
        card.bandwidth_bytes_per_s * eighths / 8,
    )
