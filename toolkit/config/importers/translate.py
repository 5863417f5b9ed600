"""Entries of a foreign file, by the rows of its table, to the keys of a run file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.base.secrets import find_secret, is_secret_key
from toolkit.config.importers.foreign import Computed, Entry, Foreign, Unread
from toolkit.config.importers.mapping import Later, Row, Table, Unfit, resolve_trl
from toolkit.config.wording import show

if TYPE_CHECKING:
    from collections.abc import Iterable

HIDDEN = "[hidden]"


@dataclass(frozen=True, slots=True)
class Written:
    """One key of the run file, with why it is there."""

    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Told:
    """A setting that is not in the run file, and why."""

    place: str
    key: str
    value: str
    why: str


@dataclass(slots=True)
class Translation:
    """A run file in the making, with what became of each setting of the other file."""

    foreign: Foreign
    table: Table
    written: dict[str, Written] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    reward_notes: list[str] = field(default_factory=list)  # beside ``rewards``
    left_out: list[Told] = field(default_factory=list)
    refused: list[Told] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # of the user's rewards

    def get(self, key: str, default: Any = None) -> Any:
        """The value of one of our keys so far."""
        found = self.written.get(key)
        return default if found is None else found.value

    def write(self, key: str, value: Any, why: str) -> None:
        """Write one of our keys; a second setting replaces the first, and the file says so."""
        before = self.written.get(key)
        if before is not None and before.value != value:
            self.notes.append(
                f"{key}: {show(value)} ({why}) replaces {show(before.value)} ({before.why})"
            )
        self.written[key] = Written(value, why)

    def take(self, *keys: str) -> dict[str, Entry]:
        """The entries with these keys of the other tool, the last of each."""
        return {entry.key: entry for entry in self.foreign.entries if entry.key in keys}

    def value_of(self, key: str, default: Any = None) -> Any:
        """The value of a key of the other tool, if it is one that could be read."""
        found = self.take(key).get(key)
        return default if found is None or isinstance(found.value, Computed) else found.value

    def reward(self, name: str, note: str, **options: Any) -> None:
        """Add a reward function; ``options`` are its own."""
        self.rewards.append({"name": name, **({"options": options} if options else {})})
        self.reward_notes.append(note)
        module = name.partition(":")[0]
        if ":" in name and module not in self.modules:
            self.modules.append(module)

    def refuse(self, entry: Entry, why: str) -> None:
        """Tell a setting that asks for what is not done here."""
        self.refused.append(_told(entry, why))

    def leave(self, entry: Entry, why: str) -> None:
        """Tell a setting that is not needed here."""
        self.left_out.append(_told(entry, why))

    def miss(self, entry: Entry, why: str) -> None:
        """Tell a setting that could not be read."""
        self.unread.append(Unread(entry.place, f"{entry.key}: {_shown(entry)}", why))


def translate(foreign: Foreign, table: Table) -> Translation:
    """The run file of a foreign file; problems in it are reported, never raised."""
    made = Translation(foreign, table)
    made.unread += foreign.unread
    for entry in foreign.entries:
        _one(made, entry)
    if table.finish is not None:
        table.finish(made)
    for default in table.defaults:
        if default.to not in made.written:
            made.written[default.to] = Written(default.value, default.why)
    _weigh(made)
    _evaluate(made)
    return made


def _one(made: Translation, entry: Entry) -> None:
    row = made.table.find(entry.key)
    if is_secret_key(entry.key.rpartition(".")[2]) or _secret(entry.value):
        made.leave(entry, "a run file holds no secrets: export it in the shell")
    elif row is None:
        made.miss(entry, f"no key of {made.table.title} that is known here")
    elif isinstance(entry.value, Computed):
        _computed(made, entry, row, entry.value)
    else:
        try:
            _place(made, entry, row)
        except Unfit as reason:
            made.refuse(entry, str(reason))
        except Later:
            pass


def _secret(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and find_secret(value) is not None


def _computed(made: Translation, entry: Entry, row: Row, value: Computed) -> None:
    if row.refused:
        made.refuse(entry, row.why)
    elif row.computed or (row.to is None and not row.trl):
        made.leave(entry, row.computed or row.why)
    else:
        where = f"; write {row.to} yourself" if row.to else ""
        made.miss(entry, f"{value.why}{where}")


def _place(made: Translation, entry: Entry, row: Row) -> None:
    if row.trl:
        to, value = resolve_trl(row, entry.value)
        if to is None:
            made.leave(entry, row.why or "it is so in every run")
        else:
            made.write(to, value, _why(entry, row))
    elif row.to is not None:
        value = entry.value if row.convert is None else row.convert(entry.value)
        if value is None:
            made.leave(entry, row.why or "the default is used")
        else:
            made.write(row.to, value, _why(entry, row))
    elif row.refused:
        off = row.is_off(entry.value)
        made.leave(entry, "it is so here") if off else made.refuse(entry, row.why)
    else:
        made.leave(entry, row.why)


def _why(entry: Entry, row: Row) -> str:
    return f"{entry.place}: {entry.key}" + (f"; {row.why}" if row.why and not row.trl else "")


def _told(entry: Entry, why: str) -> Told:
    return Told(entry.place, entry.key, _shown(entry), why)


def _shown(entry: Entry) -> str:
    value = entry.value
    if is_secret_key(entry.key.rpartition(".")[2]):
        return HIDDEN
    return value.text if isinstance(value, Computed) else show(value)


def _evaluate(made: Translation) -> None:
    """A batch of evaluation that holds whole groups, where the default of 8 does not."""
    size, group = "grpo.per_device_eval_batch_size", made.get("grpo.num_generations")
    held_out = made.get("dataset.eval_path") or made.get("dataset.eval_split")
    if held_out and size not in made.written and type(group) is int and group > 0 and 8 % group:
        made.write(size, group, "whole groups of num_generations")


def _weigh(made: Translation) -> None:
    """Hand ``grpo.reward_weights`` to the rewards, which have them here."""
    weights = made.written.get("grpo.reward_weights")
    if weights is None or not made.rewards:
        return
    values = weights.value if isinstance(weights.value, list) else [weights.value]
    if len(values) != len(made.rewards):
        return  # the validator compares the two
    del made.written["grpo.reward_weights"]
    for reward, weight in zip(made.rewards, values, strict=True):
        reward["weight"] = weight


def entries_of(made: Translation, keys: Iterable[str]) -> list[Entry]:
    """The entries with these keys, in the order of the file."""
    wanted = set(keys)
    return [entry for entry in made.foreign.entries if entry.key in wanted]
