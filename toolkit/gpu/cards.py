"""Find a card by its name, even if this machine does not have one. This module defines the values
of ``--gpu`` (``h200``, ``h100:3g.40gb``, ``24GiB:8.9``) and the cards that ``--require`` accepts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolkit.base import did_you_mean
from toolkit.base.errors import ConfigError
from toolkit.base.formatting import GIB, MIB
from toolkit.gpu import card_sources, card_table


@dataclass(frozen=True, slots=True)
class Card:
    """One model of card, or one of its MIG slices.

    ``total_bytes`` is the total memory that NVML reports, ``cuda_bytes`` the total memory that CUDA
    reports. ``source`` says where these sizes come from. It is one of the words that ``card_table``
    explains, such as ``read`` or ``log``. ``addresses`` and ``slice_addresses`` are the web
    addresses of the logs with the sizes. ``machine`` is the CPU architecture of machines with this
    card: ``aarch64`` for cards that exist only in aarch64 machines, else ``x86_64``.
    """

    name: str
    total_bytes: int
    cuda_bytes: int
    compute_capability: tuple[int, int]
    source: str
    machine: str = "x86_64"
    slices: tuple[tuple[str, int, str], ...] = ()
    aliases: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    slice_addresses: tuple[str, ...] = ()

    @property
    def mig_profiles(self) -> tuple[str, ...]:
        """The names of the card's MIG slices."""
        return tuple(profile for profile, _, _ in self.slices)


ARCHITECTURES = {
    "volta": ((7, 0), (7, 4)),
    "turing": ((7, 5), (7, 9)),
    "ampere": ((8, 0), (8, 8)),
    "ada": ((8, 9), (8, 9)),
    "hopper": ((9, 0), (9, 9)),
    "blackwell": ((10, 0), (12, 9)),
}
"""Maps an architecture, as written in --require, to its lowest and highest compute capability."""

ASSUMED_CAPABILITY = (8, 0)
"""The compute capability of a card that is given only by its size: the lowest one that supports
every number format of the toolkit.
"""

# (largest total in MiB, MiB that the driver reserves on such cards); see ``computed`` in
# card_table.
_DRIVER_RESERVE_MIB = ((36 << 10, 500), (100 << 10, 690), (1 << 30, 1000))
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(gib|gb|g|mib)(?::(\d+)\.(\d))?")
_OTHER_VENDORS = (
    ("AMD", r"mi\d{2,3}[ax]?|instinct.*|radeon.*|rx\d{4}.*|gfx\d+.*|amd.*|strixhalo.*"),
    ("Intel", r"arc.*|gaudi\d?|max1[15]\d0|intel.*|[ab]\d{3}m?|hl\d+"),
    ("Apple", r"m[1-5](?:pro|max|ultra)?|apple.*|mps|metal"),
)


def _parse_slices(family: str) -> tuple[tuple[str, int, str], ...]:
    slices = []
    for entry in card_table.SLICES.get(family, "").split(","):
        if entry.strip():
            profile, size = entry.split()
            source = "computed" if size.startswith("~") else "lgip"
            slices.append((profile, int(float(size.lstrip("~")) * 1024) * MIB, source))
    return tuple(slices)


def _parse_card(line: str) -> Card:
    name, nvml, cuda, capability, machine, family, rest = (
        part.strip() for part in line.split(";", 6)
    )
    source, *aliases = rest.replace(";", " ").split()
    major, minor = capability.split(".")
    reserve_mib = next(mib for size, mib in _DRIVER_RESERVE_MIB if int(nvml) <= size)
    cuda_bytes = int(float(cuda) * GIB) if float(cuda) else (int(nvml) - reserve_mib) * MIB
    return Card(
        name=name,
        total_bytes=int(nvml) * MIB,
        cuda_bytes=cuda_bytes,
        compute_capability=(int(major), int(minor)),
        source=source,
        machine="aarch64" if machine == "a" else "x86_64",
        slices=_parse_slices(family),
        aliases=tuple(aliases),
        addresses=card_sources.web_addresses(card_sources.ADDRESSES.get(aliases[0], "")),
        slice_addresses=card_sources.web_addresses(card_sources.SLICE_ADDRESSES.get(family, "")),
    )


CARDS: tuple[Card, ...] = tuple(_parse_card(line) for line in card_table.CARDS.strip().splitlines())


def _normalized(name: str) -> str:
    """Return ``name`` in a normal form. Different spellings of a card have the same normal form:
    ``NVIDIA GeForce RTX 4090``, ``rtx_4090`` and ``RTX4090``.
    """
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9.]", "", name.lower())


_BY_NORMALIZED_NAME = {
    _normalized(alias): card for card in CARDS for alias in (card.name, *card.aliases)
}


def find_card(name: str, *, where: str = "--gpu") -> Card:
    """Return the card that ``name`` describes.

    ``name`` is one of these:

    - the name or an alias of a card,
    - ``CARD:PROFILE`` for a MIG slice (``h100:3g.40gb``),
    - a memory size (``24GiB``, or ``24GiB:8.9`` with the compute capability).

    Raises ConfigError at ``where`` for an unknown card or profile. The fix of the error names the
    most similar cards.
    """
    if size_match := _SIZE.fullmatch(name.strip().lower()):
        return _card_of_size(size_match)
    base, _, profile = name.partition(":")
    card = _BY_NORMALIZED_NAME.get(_normalized(base))
    if card is None:
        raise _unknown_card_error(base, where)
    return _mig_slice(card, profile.lower().removeprefix("mig"), where) if profile else card


def _card_of_size(match: re.Match[str]) -> Card:
    """Return a card for a memory size (``24GiB``), or for a memory size and a compute capability
    (``24GiB:8.9``). CUDA can use all memory of this card. If no compute capability is given,
    ``ASSUMED_CAPABILITY`` is used.
    """
    size = int(float(match[1]) * (MIB if match[2] == "mib" else GIB))
    capability = (int(match[3]), int(match[4])) if match[3] else ASSUMED_CAPABILITY
    unit = "MiB" if match[2] == "mib" else "GiB"
    assumption = "" if match[3] else ", assumed capability {}.{}".format(*capability)
    return Card(f"a card of {match[1]} {unit}{assumption}", size, size, capability, "given")


def _unknown_card_error(name: str, where: str) -> ConfigError:
    for vendor, pattern in _OTHER_VENDORS:
        if re.fullmatch(pattern, _normalized(name)):
            return ConfigError(
                f"{name!r} is a device of {vendor}, but this toolkit supports only NVIDIA cards "
                "(CUDA) and CPUs",
                where=where,
                fix="use the name of an NVIDIA card, or a memory size with a compute capability "
                "(`24GiB:8.9`), or `--cpu`",
            )
    similar = did_you_mean.similar_words(
        _normalized(name), _BY_NORMALIZED_NAME, cutoff=0.4, max_difference=1
    )
    hint = ", ".join(dict.fromkeys(_BY_NORMALIZED_NAME[key].aliases[0] for key in similar))
    known = ", ".join(card.aliases[0] for card in CARDS)
    size = ". You can also give a memory size (`24GiB`, or `24GiB:8.9` with a compute capability)"
    fix = (
        f"did you mean {hint}? Known cards: {known}"
        if hint
        else f"use one of the known cards: {known}"
    )
    return ConfigError(f"unknown card {name!r}", where=where, fix=fix + size)


def _mig_slice(card: Card, profile: str, where: str) -> Card:
    for name, size, source in card.slices:
        if name == profile:
            return Card(
                f"{card.name} MIG {profile}",
                size,
                size,
                card.compute_capability,
                source,
                card.machine,
            )
    known = ", ".join(card.mig_profiles)
    fix = f"use one of its profiles: {known}" if known else "use a card that supports MIG"
    raise ConfigError(f"{card.name} has no MIG profile {profile!r}", where=where, fix=fix)


def card_of_nvml_name(name: str) -> Card | None:
    """Return the card of the table that NVML reports as ``name``; None if the table does not
    contain this card.
    """
    return _BY_NORMALIZED_NAME.get(_normalized(name))


def check_card_requirement(requirement: str, *, where: str = "--require") -> None:
    """Raise ConfigError at ``where`` unless ``requirement`` is a card, a family of cards (``a100``,
    ``rtx-40``) or an architecture (``hopper``).
    """
    if requirement.lower() in ARCHITECTURES:
        return
    if not any(card_matches(requirement, card.name, card.compute_capability) for card in CARDS):
        find_card(requirement, where=where)


def card_matches(requirement: str, name: str, capability: tuple[int, int] | None) -> bool:
    """Whether the card ``name`` is one of the cards that ``requirement`` describes.

    ``requirement`` may be one of these:

    - one or more words of a card's name: ``h100`` matches every H100, ``a100-80gb`` every A100 with
      80 GB,
    - a GeForce series (``rtx-40``),
    - an architecture (``hopper``),
    - an alias of a card in the table.
    """
    text = requirement.strip().lower()
    if text in ARCHITECTURES:
        first, last = ARCHITECTURES[text]
        return capability is not None and first <= capability <= last
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if series := re.fullmatch(r"(?:rtx[-_ ]?)?([2-5]0)", text):
        return "geforce" in words and any(re.fullmatch(series[1] + r"\d0", word) for word in words)
    required_words = [word for word in re.split(r"[^a-z0-9]+", text) if word]
    if required_words and all(word in words or f"{word}gb" in words for word in required_words):
        return True
    card = _BY_NORMALIZED_NAME.get(_normalized(text))
    return card is not None and card.name == name
