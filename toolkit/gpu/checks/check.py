"""The classes of checks. A check is a small function with two arguments: a snapshot of the node,
and the requirements of the job (``CheckContext``). The function returns an ``Outcome``. The class
``Check`` adds the texts for users.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from toolkit.gpu import devices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from toolkit.gpu.reading import Reading
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

Verdict = Literal["ok", "warn", "fail", "unknown"]
Blame = Literal["user", "node", "retry"]
_SEVERITY: dict[Verdict, int] = {"ok": 0, "warn": 1, "unknown": 2, "fail": 3}


# The remedy for an unknown result, which does not mean that something is broken: the check's own
# remedy would mislead.
UNKNOWN_REMEDY = (
    "run the check again, as a user with more rights if a file is not readable, or skip the "
    "check with `--skip`"
)


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What the job requires of the node, as plain values. All defaults mean "no requirement".

    - ``configured``: whether the values come from a run file. If so, checks fail only for what the
      run file requires. For example, a GPU without a driver is only a warning if the run can use
      the CPU.
    - ``node``: whether the whole node is checked, independent of any job (``--node``).
    - ``engine``: auto, vllm or transformers.
    - ``gpu_memory_utilization``: None means auto.
    - ``world_size``: the number of the job's processes on this node.
    - ``lock``: maps a package to its version in the lock file.
    - ``sizer_model_types``: the values of ``model_type`` for which the sizer is exact.
    - ``absent_packages``: the packages that are not installed, but that the run's environment,
      trackers and optimizer need. Each entry is a text with the name of the package and the
      command that installs the package.
    """

    configured: bool = False
    node: bool = False
    gpu_index: int | None = None
    required_gpus: int = 0
    required_card: str | None = None
    required_capability: tuple[int, int] | None = None
    required_free_bytes: int = 0
    required_driver: str | None = None
    engine: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    float8_kv_cache: bool = False
    dtype: str = "auto"
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    world_size: int = 1
    model: str | None = None
    revision: str | None = None
    sizer_model_types: tuple[str, ...] | None = None
    lock: Mapping[str, str] | None = None
    absent_packages: tuple[str, ...] = ()

    @property
    def gpu_count(self) -> int:
        """The number of cards of this node that the job uses. One process uses one card, so the job
        needs the largest of required_gpus, world_size and tensor_parallel_size.
        """
        return max(self.required_gpus, self.world_size, self.tensor_parallel_size)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults. ``envcheck record`` saves these
        fields.
        """
        changed = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if getattr(self, item.name) != item.default
        }
        return {name: _json_value(value) for name, value in changed.items()}


def _json_value(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def context_from_json(data: object) -> CheckContext:
    """Return the CheckContext that ``CheckContext.to_json`` converted to ``data``.

    Raises ValueError if ``data`` is not a recorded context or has unknown names.
    """
    if not isinstance(data, dict):
        raise ValueError("the context must be an object")
    field_names = {item.name for item in fields(CheckContext)}
    if set(data) - field_names:
        raise ValueError(
            f"the context has unknown names: {', '.join(sorted(set(data) - field_names))}"
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return CheckContext(**values)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a check. ``evidence`` says what was found, and ``blame`` says who must act.
    ``remedy`` says what to do about this outcome. If ``remedy`` is None, the general remedy of the
    check applies.
    """

    verdict: Verdict
    evidence: str
    blame: Blame | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check. ``remedy`` is None if the verdict is ok. ``blame`` says who must
    act; it is None unless the verdict is fail.
    """

    id: str
    verdict: Verdict
    evidence: str
    remedy: str | None = None
    blame: Blame | None = None

    def to_json(self) -> dict[str, Any]:
        """Return this result as an entry of the list ``checks`` in report.schema.json."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True)
class Check:
    """A check: its id, its texts, and its function ``run``. The function returns None if the check
    does not apply (no GPU, no run file, no model).

    ``envcheck explain ID`` prints the texts ``title``, ``why`` and ``remedy``. ``about_node`` is
    true for the checks that ``--node`` runs. These checks concern the health of the node, not a
    job.
    """

    id: str
    title: str
    why: str
    remedy: str
    run: Callable[[NodeSnapshot, CheckContext], Outcome | None]
    about_node: bool = False

    @property
    def family(self) -> str:
        """The family of the check: the part of its id before the dot."""
        return self.id.partition(".")[0]

    def result(self, snapshot: NodeSnapshot, context: CheckContext) -> CheckResult | None:
        """Run the check and return its result; None if the check does not apply. The result has a
        remedy only if the verdict is not ok, and a blame only if the verdict is fail.
        """
        outcome = self.run(snapshot, context)
        if outcome is None:
            return None
        if outcome.verdict == "ok":
            return CheckResult(self.id, "ok", outcome.evidence)
        default_remedy = UNKNOWN_REMEDY if outcome.verdict == "unknown" else self.remedy
        remedy = outcome.remedy or default_remedy
        blame = outcome.blame if outcome.verdict == "fail" else None
        assert outcome.verdict != "fail" or blame, f"{self.id}: a failure must say who must act"
        return CheckResult(self.id, outcome.verdict, outcome.evidence, remedy, blame)


CheckRow = tuple[str, str, str, str, "Callable[[NodeSnapshot, CheckContext], Outcome | None]"]


def make_checks(rows: tuple[CheckRow, ...], about_node: tuple[str, ...] = ()) -> tuple[Check, ...]:
    """Return one Check for each row of (id, title, why, remedy, run). ``about_node`` contains the
    ids of the checks that ``--node`` runs.
    """
    return tuple(Check(*row, about_node=row[0] in about_node) for row in rows)


def ok(evidence: str) -> Outcome:
    """Return the outcome of a check that found no problem."""
    return Outcome("ok", evidence)


def warn(evidence: str, remedy: str | None = None) -> Outcome:
    """Return the outcome of a check that found a problem that does not stop the run."""
    return Outcome("warn", evidence, remedy=remedy)


def fail(blame: Blame, evidence: str, remedy: str | None = None) -> Outcome:
    """Return the outcome of a check that found that the run will not work on this node. ``blame``
    says who must act.
    """
    return Outcome("fail", evidence, blame, remedy)


def unknown(evidence: str, remedy: str | None = None) -> Outcome:
    """Return the outcome of a check that could not find out whether there is a problem."""
    return Outcome("unknown", evidence, remedy=remedy)


def unread_outcome(reading: Reading[Any], what: str) -> Outcome | None:
    """Return the outcome of a check whose value could not be read from the driver.

    If the query failed, the outcome is "unknown", so that a failed query never counts as a pass. If
    the driver does not support the query, the check does not apply, and the result is None.
    """
    return None if reading.unsupported else unknown(f"{what} could not be read: {reading.reason}")


def devices_to_check(snapshot: NodeSnapshot, context: CheckContext) -> tuple[GpuSnapshot, ...]:
    """Return the cards and slices that the job would use. With ``context.node``, return every card
    of the node.

    Usually these are the devices that CUDA sees. But if neither CUDA_VISIBLE_DEVICES nor
    --gpu-index selects cards, and no card has MIG slices, the result is every card of the node.
    This includes cards that no longer respond. CUDA skips a card that does not respond and
    renumbers the other cards, so the job would get another card than expected. The result
    includes the lost card, so that a check can report it.
    """
    is_selected = (
        context.gpu_index is not None or devices.CUDA_VISIBLE_DEVICES in snapshot.environment
    )
    if context.node or not (is_selected or any(gpu.slices for gpu in snapshot.gpus)):
        return snapshot.gpus
    visible = devices.visible_devices(snapshot).devices
    if context.gpu_index is None:
        return visible
    return visible[context.gpu_index : context.gpu_index + 1]


def cards_to_check(snapshot: NodeSnapshot, context: CheckContext) -> tuple[GpuSnapshot, ...]:
    """Return the physical cards of the devices that ``devices_to_check`` returns. For a MIG slice
    this is the card that the slice belongs to, because memory errors and links are properties of
    the card.
    """
    cards = [devices.parent_card(snapshot, gpu) for gpu in devices_to_check(snapshot, context)]
    return tuple({card.index: card for card in cards}.values())


def check_each_gpu(
    gpus: tuple[GpuSnapshot, ...], check_gpu: Callable[[GpuSnapshot], Outcome | None]
) -> Outcome | None:
    """Call ``check_gpu`` for every card, and return one outcome for all cards; None if no card has
    an outcome. The outcome has the worst verdict of all cards, and its text lists the cards with
    this verdict. Cards that do not respond are skipped, because the check ``health.lost`` reports
    them.
    """
    results = [(gpu, check_gpu(gpu)) for gpu in gpus if not gpu.lost]
    outcomes = [(gpu, outcome) for gpu, outcome in results if outcome is not None]
    if not outcomes:
        return None
    worst = max(
        (outcome for _, outcome in outcomes), key=lambda outcome: _SEVERITY[outcome.verdict]
    )
    worst_outcomes = [
        (gpu, outcome) for gpu, outcome in outcomes if outcome.verdict == worst.verdict
    ]
    if len({outcome.evidence for _, outcome in worst_outcomes}) == 1:
        gpu_names = _name_gpus([gpu for gpu, _ in worst_outcomes], len(gpus))
        evidence = f"{gpu_names}: {worst.evidence}"
    else:
        evidence = "; ".join(f"{gpu.label}: {outcome.evidence}" for gpu, outcome in worst_outcomes)
    return Outcome(worst.verdict, evidence, worst.blame, worst.remedy)


def _name_gpus(gpus: list[GpuSnapshot], total: int) -> str:
    if len(gpus) == 1:
        return gpus[0].label
    if len(gpus) == total:
        return f"all {total} GPUs"
    return "GPUs " + ", ".join(str(gpu.index) for gpu in gpus)
