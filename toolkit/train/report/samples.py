"""The part of the report that shows completions of the model at a few steps of the run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from toolkit.train.report.axis import mean, short_number
from toolkit.train.report.log_files import finite_number, section
from toolkit.train.report.markup import escape, escape_start

if TYPE_CHECKING:
    from toolkit.train.report.log_files import RunFiles

MAX_PROMPTS = 2
MAX_COMPLETIONS = 4
MAX_CHARACTERS = 1500


def samples_html(run: RunFiles) -> str:
    """The HTML of the completions, with one column per selected step. Empty without completions."""
    columns = [_step_html(step, rows) for step, rows in sorted(run.samples.items())]
    if not columns:
        return ""
    note = "a few steps with some of their prompts; the best completion of a prompt comes first"
    inner = "".join(columns)
    return f"<h2>Completions</h2><p class=note>{note}</p><div class=samples>{inner}</div>"


def _step_html(step: int, rows: list[dict[str, Any]]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.get("prompt"), sort_keys=True), []).append(row)
    mean_reward = short_number(mean([finite_number(row.get("reward")) for row in rows]))
    shown_groups = sorted(groups.values(), key=lambda group: -_reward_range(group))[:MAX_PROMPTS]
    body = "".join(_group_html(group) for group in shown_groups)
    head = f"<h3>Step {step}<small>mean reward {escape(mean_reward)}</small></h3>"
    return f"<section class='card sample'>{head}{body}</section>"


def _reward_range(group: list[dict[str, Any]]) -> float:
    """The difference between the best and the worst reward of a group.

    Groups with a large difference are shown first, because the model learns most from them.
    """
    rewards = [finite_number(row.get("reward")) or 0.0 for row in group]
    return max(rewards) - min(rewards)


def _group_html(group: list[dict[str, Any]]) -> str:
    by_completion: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(group, key=lambda row: -(finite_number(row.get("reward")) or 0.0)):
        by_completion.setdefault(json.dumps(row.get("completion"), sort_keys=True), []).append(row)
    shown_completions = list(by_completion.values())
    if len(shown_completions) > MAX_COMPLETIONS:  # the best, and the worst for contrast
        shown_completions = [*shown_completions[: MAX_COMPLETIONS - 1], shown_completions[-1]]
    prompt = f"<div class=prompt>{_message_html(group[0].get('prompt'))}</div>"
    return prompt + "".join(_completion_html(rows[0], len(rows)) for rows in shown_completions)


def _completion_html(row: dict[str, Any], count: int) -> str:
    reward, advantage = finite_number(row.get("reward")), finite_number(row.get("advantage"))
    css_class = "none" if advantage is None or advantage == 0 else "up" if advantage > 0 else "down"
    labels = [f"advantage {short_number(advantage)}"] if advantage is not None else []
    labels += [
        f"{name} {short_number(finite_number(value))}"
        for name, value in section(row, "rewards").items()
    ]
    labels += [f"{count} times"] if count > 1 else []
    head = "".join(f"<span>{escape(label)}</span>" for label in labels)
    return (
        f"<div class='completion {css_class}'><p class=chips><b>{escape(short_number(reward))}</b>"
        f"{head}</p><pre>{_message_html(row.get('completion'))}</pre></div>"
    )


def _message_html(value: object) -> str:
    """The HTML of a text, or of the messages of a chat with their roles."""
    if not isinstance(value, list):
        plain_text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
        return escape_start(plain_text, MAX_CHARACTERS) or "<i class=more>empty</i>"
    messages = [message for message in value if isinstance(message, dict)]
    if len(messages) == 1 and messages[0].get("role") == "assistant":
        return _message_html(messages[0].get("content"))
    return "".join(
        f"<i class=role>{escape(message.get('role'))}</i>{_message_html(message.get('content'))}\n"
        for message in messages
    )
