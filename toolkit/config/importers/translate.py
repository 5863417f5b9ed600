"""Convert the settings of another tool's file to keys and values of a run file. The table of the
file's format says how each key is converted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.secrets import find_secret, is_secret_key
from toolkit.config.importers.foreign import Computed
from toolkit.config.importers.mapping import (
    ConvertedLater,
    RunValue,
    Translation,
    UnsupportedValue,
    convert_trl_setting,
)

if TYPE_CHECKING:
    from toolkit.config.importers.foreign import Entry, ForeignConfig
    from toolkit.config.importers.mapping import Row, Table


def translate(foreign: ForeignConfig, table: Table) -> Translation:
    """Return the conversion of ``foreign`` (the settings of another tool's file) with ``table``.
    Settings that cannot be converted are recorded in the result, and do not raise an exception.
    """
    translation = Translation(foreign, table)
    translation.unread += foreign.unread
    for entry in foreign.entries:
        _convert_entry(translation, entry)
    if table.finish is not None:
        table.finish(translation)
    for default in table.defaults:
        if default.run_key not in translation.run_values:
            translation.run_values[default.run_key] = RunValue(default.value, default.why)
    _move_reward_weights(translation)
    _set_eval_batch_size(translation)
    return translation


def _convert_entry(translation: Translation, entry: Entry) -> None:
    row = translation.table.find_row(entry.key)
    if is_secret_key(entry.key.rpartition(".")[2]) or _is_secret(entry.value):
        translation.leave_out(
            entry, "a run file must not contain secrets: set an environment variable instead"
        )
    elif row is None:
        translation.record_unread(entry, f"this is not a known key of {translation.table.title}")
    elif isinstance(entry.value, Computed):
        _record_computed(translation, entry, row, entry.value)
    else:
        try:
            _apply_row(translation, entry, row)
        except UnsupportedValue as reason:
            translation.refuse(entry, str(reason))
        except ConvertedLater:
            pass


def _is_secret(value: object) -> bool:
    return isinstance(value, str) and len(value) >= 16 and find_secret(value) is not None


def _record_computed(translation: Translation, entry: Entry, row: Row, value: Computed) -> None:
    if row.refused:
        translation.refuse(entry, row.why)
    elif row.computed_reason or (row.run_key is None and not row.migrated_key):
        translation.leave_out(entry, row.computed_reason or row.why)
    else:
        advice = f"; set {row.run_key} yourself" if row.run_key else ""
        translation.record_unread(entry, f"{value.why}{advice}")


def _apply_row(translation: Translation, entry: Entry, row: Row) -> None:
    if row.migrated_key:
        run_key, value = convert_trl_setting(row, entry.value)
        if run_key is None:
            translation.leave_out(entry, row.why or "every run works like this")
        else:
            translation.write(run_key, value, _origin(entry, row))
    elif row.run_key is not None:
        value = entry.value if row.convert is None else row.convert(entry.value)
        if value is None:
            translation.leave_out(entry, row.why or "the default is used")
        else:
            translation.write(row.run_key, value, _origin(entry, row))
    elif row.refused:
        is_off = row.is_off(entry.value)
        translation.leave_out(entry, "every run works like this") if is_off else translation.refuse(
            entry, row.why
        )
    else:
        translation.leave_out(entry, row.why)


def _origin(entry: Entry, row: Row) -> str:
    return f"{entry.location}: {entry.key}" + (
        f"; {row.why}" if row.why and not row.migrated_key else ""
    )


def _set_eval_batch_size(translation: Translation) -> None:
    """Set the evaluation batch size to num_generations if the default size of 8 is not valid. The
    evaluation batch size must be a multiple of num_generations. Nothing is set if the run does not
    evaluate.
    """
    size_key, group_size = (
        "grpo.per_device_eval_batch_size",
        translation.get("grpo.num_generations"),
    )
    has_eval_data = translation.get("dataset.eval_path") or translation.get("dataset.eval_split")
    if (
        has_eval_data
        and size_key not in translation.run_values
        and type(group_size) is int
        and group_size > 0
        and 8 % group_size
    ):
        translation.write(
            size_key, group_size, "the batch size must be a multiple of num_generations"
        )


def _move_reward_weights(translation: Translation) -> None:
    """Move the weights from ``grpo.reward_weights`` to the keys ``weight`` of the
    reward functions.
    """
    weights = translation.run_values.get("grpo.reward_weights")
    if weights is None or not translation.rewards:
        return
    values = weights.value if isinstance(weights.value, list) else [weights.value]
    if len(values) != len(translation.rewards):
        return  # the validator reports that the numbers differ
    del translation.run_values["grpo.reward_weights"]
    for reward, weight in zip(translation.rewards, values, strict=True):
        reward["weight"] = weight
