"""Rules on the trackers in report_to, and on packages that must be installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import (
    TARGETED_OPTIMIZERS,
    TRACKER_WORDS,
    TRACKERS,
    is_installed,
    needed_packages,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run

REPORT_TO = "grpo.report_to"


def _written_trackers(run: Run) -> list[tuple[str, Node]]:
    """The names of the trackers in report_to, each with the YAML node that contains the name."""
    node = run.node(REPORT_TO)
    if node is None or node.value is None or not run.is_set(REPORT_TO):
        return []
    nodes = node.value if isinstance(node.value, list) else [node]
    return [(item.value, item) for item in nodes if isinstance(item.value, str)]


@rule(
    "GRPO037",
    REPORT_TO,
    example="grpo:\n  report_to: wandbb",
    fix="report_to: wandb",
)
def trackers_are_known(run: Run) -> Iterator[RuleViolation]:
    """Every tracker in report_to is a tracker that transformers supports.

    The value of report_to is one tracker, a list of trackers, `all` (every installed tracker), or
    `none`. With any of these values the run writes metrics.jsonl and report.html.
    """
    trackers = _written_trackers(run)
    for index, (name, node) in enumerate(trackers):
        is_only_tracker = len(trackers) == 1
        if name in TRACKERS or (name in TRACKER_WORDS and is_only_tracker):
            continue
        is_item = run.node(REPORT_TO) is not node
        path = ("grpo", "report_to", index) if is_item else ("grpo", "report_to")
        if name in TRACKER_WORDS:
            yield RuleViolation(
                path,
                f"{name} cannot be combined with other trackers",
                fixes=(Fix(f"remove {name}"),),
            )
            continue
        suggestion = nearest(name, (*TRACKERS, *TRACKER_WORDS))
        fix = run.replace_fix(node, suggestion) if suggestion else run.set_fix(REPORT_TO, "none")
        yield RuleViolation(
            path,
            f"{name} is not a tracker that transformers supports",
            notes=(f"legal values: {', '.join((*TRACKERS, *TRACKER_WORDS))}",),
            fixes=(Fix(f"report_to: {suggestion}" if suggestion else fix.text, fix.edits),),
        )


@rule(
    "GRPO038",
    f"{REPORT_TO} grpo.optim grpo.cache_implementation",
    example="grpo:\n  report_to: wandb  # and wandb is not installed",
    fix="pip install wandb",
    severity=Severity.WARNING,
)
def packages_are_installed(run: Run) -> Iterator[RuleViolation]:
    """The packages that report_to, optim and cache_implementation need are installed.

    A missing package is a warning, because the run may be meant for another machine (with --strict
    it is an error). Training stops before the engine starts if a package is missing.
    """
    trackers = tuple(name for name, _ in _written_trackers(run))
    # GRPO013 reports Liger, and GRPO035 optimizers with targets.
    needed = needed_packages(
        trackers,
        run.get("grpo.optim"),
        use_liger=False,
        cache=run.get("grpo.cache_implementation"),
    )
    for key, value, package in needed:
        if not value.startswith(TARGETED_OPTIMIZERS) and not is_installed(package):
            yield RuleViolation(
                f"grpo.{key}",
                f"{value} needs {package.install}, which is not installed here",
                fixes=(Fix(f"pip install {package.install}"),),
                unknown=True,
            )
