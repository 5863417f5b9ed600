"""report.html is self-contained, and complete for every state of a run. Text of the model adds no
markup to the page.
"""

from __future__ import annotations

import json
import re
import stat
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import CONFIG, HOSTILE, make_run, write_rows
from report_reader import Page, render_report

from toolkit.train.report.markup import escape, escape_start

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "my-run", 60)


def test_a_finished_run(finished: Path) -> None:
    source, parsed = render_report(finished)
    titles = parsed.text["h3"]
    for curve in ("Reward", "Completion length", "KL to", "Entropy", "Loss", "Step time", "Engine"):
        assert curve in titles
    assert "finished, 60 steps" in source
    assert parsed.text["h1"] == f"{finished.parent.name}/my-run"
    assert "0.31 → 0.74" in source
    assert "NVIDIA H200" in source
    assert "Step 1" in titles
    assert "Step 60" in titles
    assert 'class="band' in source
    assert 'class="mark"' in source
    assert stat.S_IMODE((finished / "report.html").stat().st_mode) & ~0o644 == 0


def test_dynamic_sampling_and_the_curriculum_are_shown(tmp_path: Path, finished: Path) -> None:
    run_dir = make_run(tmp_path / "run", 20)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for step, row in enumerate(row for row in rows if "reward" in row):
        row |= {
            "dynamic_sampling/no_spread_before": 0.5,
            "dynamic_sampling/no_spread_after": 0.25,
            "dynamic_sampling/sampled_completions": 40,
            "dynamic_sampling/discarded_completions": 8,
            "curriculum/measured_share": step / 100,
            "curriculum/repeated_share": 0.5,
            "curriculum/expected_spread": 0.4,
            "curriculum/mean_spread": 0.2,
        }
    write_rows(run_dir / "metrics.jsonl", rows)
    config = json.loads((run_dir / "config.json").read_text())
    config["grpo"] |= {"dynamic_sampling": True, "max_resample_times": 4, "curriculum": True}
    (run_dir / "config.json").write_text(json.dumps(config))
    source, parsed = render_report(run_dir)
    titles = (
        "Dynamic sampling", "Completions drawn and not trained on", "Curriculum",
        "Difficulty of chosen prompts",
    )  # fmt: skip
    assert all(title in parsed.text["h3"] for title in titles)
    assert "20%" in source
    assert "of 800 completions were not trained on" in source
    assert "at most 4 rounds" in source
    plain, parsed = render_report(finished)
    assert not any(title in parsed.text["h3"] for title in titles)
    assert "not trained on" not in plain


def test_the_page_makes_no_network_request(finished: Path) -> None:
    source, parsed = render_report(finished)
    assert re.findall(r"\burl\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", source) == []
    policies = [value for name, value in parsed.attributes if name == "content" and "src" in value]
    (policy,) = policies
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_curves_need_no_script(finished: Path) -> None:
    source, _ = render_report(finished)
    without = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert len(re.findall(r'<path class="line t1" d="M[\d.]', without)) >= 10


def test_the_points_for_the_script_are_those_of_the_curve(finished: Path) -> None:
    _, parsed = render_report(finished)
    points = [json.loads(v or "") for name, v in parsed.attributes if name == "data-points"]
    assert len(points) >= 10
    for chart in points:
        assert len(chart["x"]) == len(chart["px"]) == len(chart["y"][0]) == len(chart["py"][0])
        assert chart["x"][-1] == 60


def _add_hostile_text(folder: Path) -> None:
    for name in ("completions", "metrics"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if name == "metrics":
                row[f"rewards/{HOSTILE}/mean"] = 0.5
            else:
                row["prompt"] = row["completion"] = HOSTILE
                row["rewards"] = {HOSTILE: 1.0}
        write_rows(path, rows)
    for name in ("config", "manifest", "preflight", "evaluation"):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(_with_hostile_text(json.loads(path.read_text()))))


def _with_hostile_text(value: Any) -> Any:
    """Append hostile text to each string of a document, and add a hostile key to each mapping."""
    if isinstance(value, dict):
        return {key: _with_hostile_text(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [_with_hostile_text(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_output_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<script>alert(1)", 12)
    _add_hostile_text(folder)
    source, parsed = render_report(folder)
    assert "<script>document.title" in parsed.text["pre"]
    assert "<script>alert(1)" in parsed.text["h1"]
    assert source.count("<script>") == 1
    for hidden in ("\u202e", "\x1b", "\x00"):
        assert hidden not in source
    assert "[U+202E]evil" in source


def test_equal_completions_are_shown_once_and_the_worst_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2)
    scored = [("best", 1.0), ("same", 0.5), ("same", 0.5), ("b", 0.4), ("c", 0.3), ("worst", -1.0)]
    rows = [
        {"step": 1, "prompt": "p", "completion": c, "reward": r, "advantage": r} for c, r in scored
    ]
    write_rows(folder / "completions.jsonl", rows)
    source, _ = render_report(folder)
    assert re.findall(r"<pre>(\w+)</pre>", source) == ["best", "same", "b", "worst"]
    assert source.count("2 times") == 1


def test_hostile_chats_stay_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2)
    odd = [
        {"role": HOSTILE, "content": HOSTILE},
        {"role": 1},
        "x",
        {"content": [{"text": HOSTILE}]},
    ]
    row = {
        "step": 1,
        "prompt": odd,
        "completion": odd,
        "reward": "x",
        "rewards": [],
        "advantage": {},
    }
    write_rows(folder / "completions.jsonl", [row])
    render_report(folder)


def test_secrets_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a canary that sings")
    token = "hf_" + "aB3dE6gH9jKl" * 3
    folder = make_run(tmp_path / "run", 3)
    text = f"my token is {token} and a canary that sings"
    row = {"step": 1, "prompt": text, "completion": text, "reward": 1.0}
    write_rows(folder / "completions.jsonl", [row])
    (folder / "config.json").write_text(json.dumps({"model": {"model_name": text}}))
    source, _ = render_report(folder)
    assert token not in source
    assert "canary" not in source
    assert "[redacted: Hugging Face token]" in source


def _cut_end(name: str, keep: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-keep])

    return edit


def _replace(name: str, content: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(content)

    return edit


def _metrics(*rows: str) -> Callable[[Path], None]:
    return _replace("metrics.jsonl", "".join(f"{row}\n" for row in rows))


@pytest.mark.parametrize(
    ("edit", "expected_text"),
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), "no step has been logged yet"),
        (lambda folder: (folder / "timings.jsonl").unlink(), "Reward"),
        (lambda folder: (folder / "completions.jsonl").unlink(), "Reward"),
        (lambda folder: (folder / "config.json").unlink(), "unknown model"),
        (_cut_end("metrics.jsonl", 20), "not be read in full: metrics.jsonl (1 incomplete line)"),
        (_cut_end("completions.jsonl", 20), "completions.jsonl (1 incomplete line)"),
        (_cut_end("config.json", 5), "could not be read in full: config.json"),
        (_replace("manifest.json", "[1, 2]"), "could not be read in full: manifest.json"),
        (_metrics('{"step": 1}'), "no reward was logged"),
        (_metrics('{"step": "1"}', "[]"), "no step has been logged yet"),
        (_metrics('{"step": 4, "reward": NaN, "kl": Infinity, "loss": 1}'), "Loss"),
        (_metrics('{"step": 4, "reward": 1e308}', '{"step": 5, "reward": -1e308}'), "Reward"),
        (_metrics('{"step": 4, "reward": 1' + "0" * 400 + "}"), "no reward was logged"),
        (_metrics('{"step": 4, "reward": 0.5, "skipped": 1}'), "not finite: 1"),
        (_replace("bad_rewards.jsonl", '{"reward": "x"}\n'), "(saved in bad_rewards.jsonl): 1"),
        (_replace("preflight.json", '{"checks": 5, "sizing": {"budget": [1, {}]}}'), "Reward"),
        (_replace("evaluation.json", '{"after": {"rewards": {"x": null}}}'), "Reward"),
        (_replace("config.json", '{"grpo": {"max_steps": 50}, "reward": 3}'), "3 of 50"),
    ],
)  # fmt: skip
def test_partial_and_broken_runs(tmp_path: Path, edit, expected_text: str) -> None:
    folder = make_run(tmp_path / "run", 3, finished=False)
    edit(folder)
    source, _ = render_report(folder)
    assert expected_text in source


def test_an_empty_folder_and_a_single_step(tmp_path: Path) -> None:
    assert "no step yet" in render_report(tmp_path)[0]
    source, _ = render_report(make_run(tmp_path / "one", 1))
    assert 'class="point t1"' in source


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    rows = [{"step": step, "reward": step % 7 / 7, "loss": 0.1} for step in range(1, 20_001)]
    write_rows(folder / "metrics.jsonl", rows)
    source, _ = render_report(folder)
    assert len(source) < 400_000
    assert "20000" in source


def test_a_step_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    rows = [{"step": 1, "reward": 9.0}, {"step": 1, "reward": 0.25}]
    write_rows(folder / "metrics.jsonl", rows)
    source, _ = render_report(folder)
    assert "<b>0.25</b>" in source


def test_a_long_completion_is_shortened_with_a_note() -> None:
    assert escape_start("x" * 10, 10) == "x" * 10
    assert escape_start("<" * 12, 10) == "&lt;" * 10 + "<i class=more> … 2 more characters</i>"


@given(st.text())
def test_escaped_text_adds_no_markup(value: str) -> None:
    parsed = Page(f'<p class="{escape(value)}">{escape(value)}</p>')
    assert parsed.tags == ["p"]
    assert [name for name, _ in parsed.attributes] == ["class"]


def test_the_config_of_the_helpers_has_the_sections_of_a_run_file() -> None:
    """The config that report_helpers writes must have the sections that a run writes."""
    assert set(CONFIG) == {"model", "lora", "dataset", "reward", "grpo", "runtime"}
