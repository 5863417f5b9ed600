"""Define the classes ``Table`` and ``Translation``. A ``Table`` has one row for each key of another
tool, and the row says how the key is converted. A ``Translation`` is the result of converting a
file: the values of the run file, and the settings that could not be converted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.secrets import is_secret_key
from toolkit.config.importers.foreign import Computed, Entry, ForeignConfig, UnreadPart
from toolkit.config.message_text import show_value
from toolkit.config.migration import CONVERSIONS, FORCED_KEYS, INERT_KEYS, MOVED_KEYS, convert_key
from toolkit.config.schemas import find_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SAME, RENAMED, LEFT_OUT, REFUSED = "same", "renamed", "left out", "refused"
KINDS = (SAME, RENAMED, LEFT_OUT, REFUSED)


class UnsupportedValue(Exception):
    """Raised for a value that cannot be expressed in a run file. The text of the exception is the
    reason.
    """


class ConvertedLater(Exception):
    """Raised by ``later`` if a key cannot be converted alone. The function ``finish`` of the table
    converts the key together with other keys.
    """


def later(_value: Any) -> Any:
    """Raise ConvertedLater. A row has this function as its ``convert`` if its key cannot be
    converted alone. The function ``finish`` of the table then converts the key.
    """
    raise ConvertedLater


class Row(NamedTuple):
    """A row of a table. It says how the key ``foreign_key`` of another tool is converted.

    ``run_key`` is the dotted key of the run file that replaces ``foreign_key``; None means that no
    key replaces it. In this case, ``refused`` is True if ``foreign_key`` requests something that
    this toolkit does not support. ``refused`` is False if a run does not need ``foreign_key``.
    ``off`` lists the values of a refused key that turn the unsupported feature off. ``why`` is the
    reason for the conversion. ``convert`` is the function that converts the value. ``migrated_key``
    is the name of the key in config/migration, if that module converts the key.

    If a script computes the value of a key, the importer does not know the value. In this case a
    row with a ``computed_reason`` leaves the key out, and ``computed_reason`` says why.
    """

    foreign_key: str
    run_key: str | None
    why: str = ""
    convert: Callable[[Any], Any] | None = None
    refused: bool = False
    off: tuple[Any, ...] = (None, False, 0, "", "none", "no")
    migrated_key: str | None = None
    computed_reason: str = ""

    @property
    def kind(self) -> str:
        """What happens to the key of this row: one of ``KINDS``."""
        if self.run_key is None:
            return REFUSED if self.refused else LEFT_OUT
        same = self.run_key.rpartition(".")[2] == self.foreign_key.rpartition(".")[2]
        return SAME if same else RENAMED

    def is_off(self, value: object) -> bool:
        """Whether ``value`` turns off the feature that the key of this row controls. This toolkit
        does not support the feature, so the key is refused with any other value.
        """
        return value in ([], {}) or any(
            type(one) is type(value) and one == value for one in self.off
        )


class Default(NamedTuple):
    """A value that is written to the run file if the other tool's file does not set the key. It is
    the other tool's default, which differs from this toolkit's default.
    """

    run_key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Table:
    """The conversion table of a format. ``format_name`` is the name of the format, and ``title`` is
    its name in messages. ``rows`` say how the keys are converted. ``defaults`` are the other tool's
    defaults that differ from this toolkit's defaults.

    The function ``finish`` is called after all rows were applied. It converts settings that depend
    on several keys, such as batch sizes and lengths.
    """

    format_name: str
    title: str
    rows: tuple[Row, ...]
    defaults: tuple[Default, ...] = ()
    finish: Callable[[Translation], None] | None = None

    @cached_property
    def by_key(self) -> dict[str, Row]:
        """The rows as a dict. The keys of the dict are the keys of the other tool."""
        by_foreign_key = {row.foreign_key: row for row in self.rows}
        assert len(by_foreign_key) == len(self.rows), "a key has two rows"
        return by_foreign_key

    @cached_property
    def key_prefixes(self) -> frozenset[str]:
        """The dotted prefixes of the other tool's keys. For the key ``a.b.c``, these are ``a`` and
        ``a.b``.
        """
        return frozenset(
            ".".join(parts[:count])
            for parts in (row.foreign_key.split(".") for row in self.rows)
            for count in range(1, len(parts))
        )

    def find_row(self, key: str) -> Row | None:
        """Return the row for a key of the other tool. If the key has no row of its own, a row
        ``prefix.*`` is used, where ``prefix`` is a dotted prefix of the key. If there are several
        such rows, return the one with the longest prefix. If there are none, return None.
        """
        row = self.by_key.get(key)
        while row is None and "." in key:
            key = key.rpartition(".")[0]
            row = self.by_key.get(f"{key}.*")
        return row


HIDDEN = "[hidden]"


@dataclass(frozen=True, slots=True)
class RunValue:
    """The value of a run file key, and the reason for this value."""

    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Omission:
    """A setting of the other tool that is left out of the run file, and the reason."""

    location: str
    key: str
    value: str
    why: str


@dataclass(slots=True)
class Translation:
    """The run file that is being made from a file of another tool, and a record of the settings
    that were left out, refused or not read.
    """

    foreign: ForeignConfig
    table: Table
    run_values: dict[str, RunValue] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    reward_notes: list[str] = field(default_factory=list)  # a note for each of ``rewards``
    left_out: list[Omission] = field(default_factory=list)
    refused: list[Omission] = field(default_factory=list)
    unread: list[UnreadPart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reward_modules: list[str] = field(default_factory=list)  # modules of the user's rewards

    def get(self, key: str, default: object = None) -> Any:
        """Return the current value of a run file key; ``default`` if it is not set yet."""
        run_value = self.run_values.get(key)
        return default if run_value is None else run_value.value

    def write(self, key: str, value: object, why: str) -> None:
        """Set a run file key to ``value``. If the key already has another value, replace that value
        and add a note.
        """
        previous = self.run_values.get(key)
        if previous is not None and previous.value != value:
            self.notes.append(
                f"{key}: {show_value(value)} ({why}) replaces {show_value(previous.value)} "
                f"({previous.why})"
            )
        self.run_values[key] = RunValue(value, why)

    def find_entries(self, *keys: str) -> dict[str, Entry]:
        """Return the settings with the given ``keys`` from the other tool's file, as a dict by key.
        If the file sets a key several times, the last setting is used.
        """
        return {entry.key: entry for entry in self.foreign.entries if entry.key in keys}

    def foreign_value(self, key: str, default: object = None) -> Any:
        """Return the value that the other tool's file sets for a key. Return ``default`` if the
        file does not set the key, or if the value is known only when the file runs.
        """
        found = self.find_entries(key).get(key)
        return default if found is None or isinstance(found.value, Computed) else found.value

    def add_reward(self, name: str, note: str, **options: Any) -> None:
        """Add a reward function with its ``options`` to the run file. ``note`` becomes a comment in
        the run file.
        """
        self.rewards.append({"name": name, **({"options": options} if options else {})})
        self.reward_notes.append(note)
        module = name.partition(":")[0]
        if ":" in name and module not in self.reward_modules:
            self.reward_modules.append(module)

    def refuse(self, entry: Entry, why: str) -> None:
        """Record a setting that requests something that this toolkit does not support, and the
        reason.
        """
        self.refused.append(_omission(entry, why))

    def leave_out(self, entry: Entry, why: str) -> None:
        """Record a setting that a run file does not need, and the reason."""
        self.left_out.append(_omission(entry, why))

    def record_unread(self, entry: Entry, why: str) -> None:
        """Record a setting whose value could not be read, and the reason."""
        self.unread.append(UnreadPart(entry.location, f"{entry.key}: {_value_text(entry)}", why))


def _omission(entry: Entry, why: str) -> Omission:
    return Omission(entry.location, entry.key, _value_text(entry), why)


def _value_text(entry: Entry) -> str:
    value = entry.value
    if is_secret_key(entry.key.rpartition(".")[2]):
        return HIDDEN
    return value.text if isinstance(value, Computed) else show_value(value)


def entries_in_order(translation: Translation, keys: Iterable[str]) -> list[Entry]:
    """Return the settings of the other tool with these keys, in the order of the file."""
    key_set = set(keys)
    return [entry for entry in translation.foreign.entries if entry.key in key_set]


def rows(to: str, *names: str, prefix: str = "") -> Iterator[Row]:
    """Return a row for each key in ``names``. The run file has the same keys in its section ``to``.
    ``prefix`` is put before the other tool's keys.
    """
    return (Row(f"{prefix}{name}", f"{to}.{name}") for name in names)


def omit(why: str, *names: str) -> Iterator[Row]:
    """Return a row for each key in ``names``. A run does not need these keys, and ``why`` is the
    reason.
    """
    return (Row(name, None, why) for name in names)


def refused(why: str, *names: str, off: tuple[Any, ...] = ()) -> Iterator[Row]:
    """Return a row for each key in ``names``. The keys request a feature that this toolkit does not
    support. The values in ``off`` turn this feature off, and so do the values that a ``Row`` has in
    ``off`` by default.
    """
    return (Row(name, None, why, refused=True, off=(*Row("", None).off, *off)) for name in names)


def trl_rows(prefix: str = "") -> Iterator[Row]:
    """Yield a row for each key that TRL's GRPOConfig has now or had in earlier versions. ``prefix``
    is put before the keys.
    """
    properties = find_schema("run")["properties"]["grpo"]["properties"]
    older_names = [
        foreign_key.partition(".")[2]
        for foreign_key in MOVED_KEYS
        if foreign_key.startswith("grpo.")
    ]
    for name in dict.fromkeys((*properties, *older_names)):
        key, foreign_key = f"grpo.{name}", f"{prefix}{name}"
        special_row, schema = _SPECIAL_ROWS.get(name), properties.get(name, {})
        if special_row is not None:
            yield special_row._replace(foreign_key=foreign_key)
        elif key in FORCED_KEYS or key in INERT_KEYS:
            yield Row(foreign_key, None, FORCED_KEYS.get(key) or INERT_KEYS[key])
        elif name in properties and "x-refused" not in schema:
            yield Row(foreign_key, key)
        else:
            refusal = schema.get("x-refused", {})
            conversion, moved_key = CONVERSIONS.get(key), MOVED_KEYS.get(key)
            run_key = (conversion.new_key if conversion else None) or (
                moved_key.new_key if moved_key else None
            )
            why = moved_key.sentence if moved_key else refusal.get("why", "")
            yield Row(
                foreign_key, run_key if run_key and "." in run_key else None, why, migrated_key=key
            )


_NO_PUBLISHING = (
    "a run writes only to its run folder; to publish it, use toolkit export and the tools of the "
    "hub"
)
_DATA_PARALLEL = (
    "every GPU has a complete copy of the model; several GPUs train data-parallel "
    "(--nproc-per-node)"
)
_ONE_PROCESS = "the engine runs in the training process, so there is no vLLM server"
_AUTO_DTYPE = "`model.dtype: auto` uses bfloat16 if the GPU supports it"
# Keys of TRL that a run file refuses, but that an imported file can simply leave out.
_SPECIAL_ROWS = {
    row.foreign_key: row
    for row in (
        Row("output_dir", "runtime.output_dir"),
        Row("trust_remote_code", "model.trust_remote_code"),
        Row("vllm_tensor_parallel_size", None, "this setting splits only the engine, but "
                                               "model.tensor_parallel_size splits the trainer "
                                               "too"),
        Row("bf16", None, _AUTO_DTYPE),
        Row("fp16", None, _AUTO_DTYPE),
        Row("bf16_full_eval", None, _AUTO_DTYPE),
        Row("fp16_full_eval", None, _AUTO_DTYPE),
        *omit(_DATA_PARALLEL, "deepspeed", "fsdp", "fsdp_config", "ds3_gather_for_generation"),
        *omit(
            _NO_PUBLISHING, "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
            "hub_strategy", "hub_always_push", "hub_revision",
        ),
        *omit(
            _ONE_PROCESS, "vllm_mode", "vllm_server_base_url", "vllm_server_host",
            "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_model_impl",
        ),
        *omit("to resume a run, start the same command again", "resume_from_checkpoint",
              "ignore_data_skip", "save_only_model", "overwrite_output_dir"),
        *omit("a run always trains; grpo.eval_strategy turns evaluation on", "do_train", "do_eval",
              "do_predict"),
        *omit("runtime.reproducible decides whether deterministic kernels are used",
              "gradient_checkpointing_kwargs"),
        *omit("the launcher (torchrun) sets this value", "local_rank"),
        *omit("every run writes a checkpoint when it receives a signal to stop",
              "enable_jit_checkpoint"),
        *omit("all logs are in the run folder", "logging_dir"),
    )
}  # fmt: skip


def convert_trl_setting(row: Row, value: object) -> tuple[str | None, Any]:
    """Return the run file key and the value that replace a setting of TRL. ``row`` is the row of
    TRL's key. The returned key is None if a run file does not need the setting. Raises
    UnsupportedValue if the user must decide.
    """
    assert row.migrated_key is not None
    conversion = convert_key(row.migrated_key, value)
    if conversion is None and row.migrated_key in MOVED_KEYS and row.run_key is None:
        return None, None  # the key was removed, and the user need not decide anything
    if conversion is None:
        raise UnsupportedValue(row.why or "a run file does not have this key")
    return conversion


def as_list(value: object) -> list[Any]:
    """Return ``value`` as a list. A value that is not a list becomes a list with one item."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
