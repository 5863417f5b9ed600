"""The table of a format, with one row per key, and the run file that is made with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.secrets import is_secret_key
from toolkit.config.importers.foreign import Computed, Entry, Foreign, Unread
from toolkit.config.migration import CONVERSIONS, FORCED, INERT, MOVED, converted
from toolkit.config.schemas import find_schema
from toolkit.config.wording import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SAME, RENAMED, LEFT_OUT, REFUSED = "same", "renamed", "left out", "refused"
KINDS = (SAME, RENAMED, LEFT_OUT, REFUSED)


class Unfit(Exception):
    """Raised for a value that a run file cannot express; the text says why."""


class Later(Exception):
    """Marks a key that the table's ``finish`` converts together with other keys."""


def later(_value: Any) -> Any:
    """The conversion function of a key that ``finish`` converts."""
    raise Later


class Row(NamedTuple):
    """One row of a table: what the key ``old`` of the other tool becomes.

    ``to`` is the dotted key of the run file. None means that the key is left out, or, with
    ``refused``, that it requests something that this toolkit does not do. ``off`` are the values of
    a refused key that turn it off. ``trl``: the key is a key of TRL, and config/migration decides.
    ``computed``: why a value that a script computes does not matter.
    """

    old: str
    to: str | None
    why: str = ""
    convert: Callable[[Any], Any] | None = None
    refused: bool = False
    off: tuple[Any, ...] = (None, False, 0, "", "none", "no")
    trl: str | None = None
    computed: str = ""

    @property
    def kind(self) -> str:
        """The kind of this row, one of ``KINDS``."""
        if self.to is None:
            return REFUSED if self.refused else LEFT_OUT
        same = self.to.rpartition(".")[2] == self.old.rpartition(".")[2]
        return SAME if same else RENAMED

    def is_off(self, value: Any) -> bool:
        """Whether a value turns the refused key off."""
        return value in ([], {}) or any(
            type(one) is type(value) and one == value for one in self.off
        )


class Default(NamedTuple):
    """The default of another tool for a key that its file does not set, if it differs from this
    toolkit's default.
    """

    to: str
    value: Any
    why: str


@dataclass(frozen=True)
class Table:
    """A format: its name for people, its rows, and the defaults of its tool.

    ``finish`` converts what needs several keys (batches, lengths) after all rows were applied.
    """

    form: str
    title: str
    rows: tuple[Row, ...]
    defaults: tuple[Default, ...] = ()
    finish: Callable[[Translation], None] | None = None

    @cached_property
    def by_key(self) -> dict[str, Row]:
        """The rows, by the key of the other tool."""
        found = {row.old: row for row in self.rows}
        assert len(found) == len(self.rows), "a key has two rows"
        return found

    @cached_property
    def groups(self) -> frozenset[str]:
        """The names of the keys that contain other keys."""
        return frozenset(
            ".".join(parts[:count])
            for parts in (row.old.split(".") for row in self.rows)
            for count in range(1, len(parts))
        )

    def find(self, key: str) -> Row | None:
        """The row of a key: its own, or that of a group ``name.*`` that contains it."""
        row = self.by_key.get(key)
        while row is None and "." in key:
            key = key.rpartition(".")[0]
            row = self.by_key.get(f"{key}.*")
        return row


HIDDEN = "[hidden]"


@dataclass(frozen=True, slots=True)
class Written:
    """One key of the run file, and why it is there."""

    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Omission:
    """A setting that is left out of the run file, and why."""

    place: str
    key: str
    value: str
    why: str


@dataclass(slots=True)
class Translation:
    """A run file in the making, and what became of each setting of the other file."""

    foreign: Foreign
    table: Table
    written: dict[str, Written] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    reward_notes: list[str] = field(default_factory=list)  # a note for each of ``rewards``
    left_out: list[Omission] = field(default_factory=list)
    refused: list[Omission] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # modules of the user's rewards

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the run file so far."""
        found = self.written.get(key)
        return default if found is None else found.value

    def write(self, key: str, value: Any, why: str) -> None:
        """Set a key of the run file. If it was set before, the new value replaces the old one, and
        a note says so.
        """
        before = self.written.get(key)
        if before is not None and before.value != value:
            self.notes.append(
                f"{key}: {show(value)} ({why}) replaces {show(before.value)} ({before.why})"
            )
        self.written[key] = Written(value, why)

    def take(self, *keys: str) -> dict[str, Entry]:
        """The entries with these keys of the other tool; if a key occurs several times, its last
        entry.
        """
        return {entry.key: entry for entry in self.foreign.entries if entry.key in keys}

    def value_of(self, key: str, default: Any = None) -> Any:
        """The value of a key of the other tool; ``default`` if it is missing or could not be
        read.
        """
        found = self.take(key).get(key)
        return default if found is None or isinstance(found.value, Computed) else found.value

    def reward(self, name: str, note: str, **options: Any) -> None:
        """Add a reward function with its ``options``."""
        self.rewards.append({"name": name, **({"options": options} if options else {})})
        self.reward_notes.append(note)
        module = name.partition(":")[0]
        if ":" in name and module not in self.modules:
            self.modules.append(module)

    def refuse(self, entry: Entry, why: str) -> None:
        """Record a setting that requests something that this toolkit does not do."""
        self.refused.append(_omission(entry, why))

    def leave(self, entry: Entry, why: str) -> None:
        """Record a setting that a run file does not need."""
        self.left_out.append(_omission(entry, why))

    def miss(self, entry: Entry, why: str) -> None:
        """Record a setting that could not be read."""
        self.unread.append(Unread(entry.place, f"{entry.key}: {_shown(entry)}", why))


def _omission(entry: Entry, why: str) -> Omission:
    return Omission(entry.place, entry.key, _shown(entry), why)


def _shown(entry: Entry) -> str:
    value = entry.value
    if is_secret_key(entry.key.rpartition(".")[2]):
        return HIDDEN
    return value.text if isinstance(value, Computed) else show(value)


def entries_of(made: Translation, keys: Iterable[str]) -> list[Entry]:
    """The entries with these keys, in the order of the file."""
    wanted = set(keys)
    return [entry for entry in made.foreign.entries if entry.key in wanted]


def rows(to: str, *names: str, prefix: str = "") -> Iterator[Row]:
    """Rows of keys that have the same name in the section ``to`` of the run file."""
    return (Row(f"{prefix}{name}", f"{to}.{name}") for name in names)


def left(why: str, *names: str) -> Iterator[Row]:
    """Rows of keys that are left out for the same reason."""
    return (Row(name, None, why) for name in names)


def refused(why: str, *names: str, off: tuple[Any, ...] = ()) -> Iterator[Row]:
    """Rows of keys that request something that this toolkit does not do. ``off``: additional values
    that turn such a key off.
    """
    return (Row(name, None, why, refused=True, off=(*Row("", None).off, *off)) for name in names)


def trl_rows(prefix: str = "") -> Iterator[Row]:
    """A row for each key of TRL's GRPOConfig, current and earlier ones, below ``prefix``."""
    known = find_schema("run")["properties"]["grpo"]["properties"]
    older = [old.partition(".")[2] for old in MOVED if old.startswith("grpo.")]
    for name in dict.fromkeys((*known, *older)):
        key, old = f"grpo.{name}", f"{prefix}{name}"
        ours, schema = _OURS.get(name), known.get(name, {})
        if ours is not None:
            yield ours._replace(old=old)
        elif key in FORCED or key in INERT:
            yield Row(old, None, FORCED.get(key) or INERT[key])
        elif name in known and "x-refused" not in schema:
            yield Row(old, key)
        else:
            refusal = schema.get("x-refused", {})
            conversion, moved = CONVERSIONS.get(key), MOVED.get(key)
            to = (conversion.to if conversion else None) or (moved.to if moved else None)
            why = moved.sentence if moved else refusal.get("why", "")
            yield Row(old, to if to and "." in to else None, why, trl=key)


_PUBLISH = "a run writes to its run folder only; toolkit export and the hub's own tools publish it"
_SPREAD = "every GPU has the whole model; several GPUs work data-parallel (--nproc-per-node)"
_ONE_PROCESS = "the engine runs in the training process; there is no server"
_FORMAT = "model.dtype auto is bfloat16 where the card has it"
# Keys of TRL that a run file refuses. For an imported file it is right to leave them out.
_OURS = {
    row.old: row
    for row in (
        Row("output_dir", "runtime.output_dir"),
        Row("trust_remote_code", "model.trust_remote_code"),
        Row("vllm_tensor_parallel_size", None, "model.tensor_parallel_size splits the trainer too"),
        Row("bf16", None, _FORMAT),
        Row("fp16", None, _FORMAT),
        Row("bf16_full_eval", None, _FORMAT),
        Row("fp16_full_eval", None, _FORMAT),
        *left(_SPREAD, "deepspeed", "fsdp", "fsdp_config", "ds3_gather_for_generation"),
        *left(
            _PUBLISH, "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
            "hub_strategy", "hub_always_push", "hub_revision",
        ),
        *left(
            _ONE_PROCESS, "vllm_mode", "vllm_server_base_url", "vllm_server_host",
            "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_model_impl",
        ),
        *left("a run is resumed by the same command", "resume_from_checkpoint",
              "ignore_data_skip", "save_only_model", "overwrite_output_dir"),
        *left("a run trains; eval_strategy switches evaluation", "do_train", "do_eval",
              "do_predict"),
        *left("runtime.reproducible decides about kernels", "gradient_checkpointing_kwargs"),
        *left("the launcher sets it", "local_rank"),
        *left("a signal makes a checkpoint in every run", "enable_jit_checkpoint"),
        *left("the run folder holds all logs", "logging_dir"),
    )
}  # fmt: skip


def resolve_trl(row: Row, value: Any) -> tuple[str | None, Any]:
    """The current key and value for a key of TRL. The key is None if the setting is dropped. Raises
    Unfit if only the user can say what was meant.
    """
    assert row.trl is not None
    today = converted(row.trl, value)
    if today is None and row.trl in MOVED and row.to is None:
        return None, None  # removed, and nothing needs a decision
    if today is None:
        raise Unfit(row.why or "a run file has no such key")
    return today


def text_list(value: Any) -> list[Any]:
    """One value or a list, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
