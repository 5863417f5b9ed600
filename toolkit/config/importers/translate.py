"""Convert the settings of another tool's file to keys and values of a run file. The table of the
file's format says how each key is converted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.secrets import find_secret, is_secret_key
from toolkit.config.importers.foreign import Computed
from toolkit.config.importers.mapping import Later, Translation, Unfit, Written, resolve_trl

if TYPE_CHECKING:
    from toolkit.config.importers.foreign import Entry, Foreign
    from toolkit.config.importers.mapping import Row, Table


def translate(foreign: Foreign, table: Table) -> Translation:
    """Return the conversion of ``foreign`` (the settings of another tool's file) with ``table``.
    Settings that cannot be converted are recorded in the result, and do not raise an exception.
    """
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
        made.leave(
            entry, "a run file must not contain secrets: set an environment variable instead"
        )
    elif row is None:
        made.miss(entry, f"this is not a known key of {made.table.title}")
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
        where = f"; set {row.to} yourself" if row.to else ""
        made.miss(entry, f"{value.why}{where}")


def _place(made: Translation, entry: Entry, row: Row) -> None:
    if row.trl:
        to, value = resolve_trl(row, entry.value)
        if to is None:
            made.leave(entry, row.why or "every run works like this")
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
        made.leave(entry, "every run works like this") if off else made.refuse(entry, row.why)
    else:
        made.leave(entry, row.why)


def _why(entry: Entry, row: Row) -> str:
    return f"{entry.place}: {entry.key}" + (f"; {row.why}" if row.why and not row.trl else "")


def _evaluate(made: Translation) -> None:
    """Set the evaluation batch size to num_generations if the default size of 8 is not valid. The
    evaluation batch size must be a multiple of num_generations. Nothing is set if the run does not
    evaluate.
    """
    size, group = "grpo.per_device_eval_batch_size", made.get("grpo.num_generations")
    held_out = made.get("dataset.eval_path") or made.get("dataset.eval_split")
    if held_out and size not in made.written and type(group) is int and group > 0 and 8 % group:
        made.write(size, group, "the batch size must be a multiple of num_generations")


def _weigh(made: Translation) -> None:
    """Move the weights from ``grpo.reward_weights`` to the keys ``weight`` of the
    reward functions.
    """
    weights = made.written.get("grpo.reward_weights")
    if weights is None or not made.rewards:
        return
    values = weights.value if isinstance(weights.value, list) else [weights.value]
    if len(values) != len(made.rewards):
        return  # the validator reports that the numbers differ
    del made.written["grpo.reward_weights"]
    for reward, weight in zip(made.rewards, values, strict=True):
        reward["weight"] = weight
