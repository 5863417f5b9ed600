"""Make the pictures and outputs that the documentation shows: ``just docs-pictures``.

Everything comes from real output: a run of ``toolkit demo``, its report, and ``envcheck size`` on
the example of sizing.md. Needs Chromium (Debian's package ``chromium``).
"""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
SIZING = DOCS / "sizing"
WIDTHS = {"": 1100, "-narrow": 480}


def command_output(*words: str, cwd: Path = DOCS.parent) -> str:
    """The output of one of our commands, as a terminal of 100 columns shows it."""
    environ = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(
        [str(Path(sys.executable).with_name(words[0])), *words[1:]],
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def sizing_output() -> str:
    """What sizing.md shows: ``envcheck size run.yaml --gpu h100`` in docs/sizing."""
    text = command_output("envcheck", "size", "run.yaml", "--gpu", "h100", cwd=SIZING)
    return text.replace(f"{SIZING}/", "")


def sizing_json() -> dict[str, Any]:
    """The same as values."""
    arguments = ("size", "run.yaml", "--gpu", "h100", "--json")
    result: dict[str, Any] = json.loads(command_output("envcheck", *arguments, cwd=SIZING))
    return result


COLOURS = {
    "weights": "#2563eb", "LoRA slots": "#7c3aed", "KV cache": "#0d9488",
    "activations of a rollout": "#f59e0b", "rest of the engine": "#94a3b8",
    "adapter and optimizer": "#db2777", "training step": "#dc2626",
    "context and margins": "#64748b",
}  # fmt: skip
TERM_GROUPS = (
    ("weights", ("engine.weights",)),
    ("LoRA slots", ("engine.lora",)),
    ("KV cache", ("engine.kv",)),
    ("activations of a rollout", ("engine.activations",)),
    ("rest of the engine", ("engine.",)),
    ("adapter and optimizer", ("trainer.adapter", "trainer.optimizer")),
    ("training step", ("trainer.",)),
    ("context and margins", ("",)),
)


def size_drawing(result: dict[str, Any]) -> str:
    """The budget of ``envcheck size --json`` as two bars, in SVG."""
    total = result["device"]["cuda_total_bytes"]
    elements, y = [], 26
    for phase, skip in (("rollouts", "training"), ("training", "rollout")):
        sums = dict.fromkeys(COLOURS, 0)
        for term in result["budget"]:
            if term["phase"] != skip:
                name = next(n for n, starts in TERM_GROUPS if term["term"].startswith(starts))
                sums[name] += term["bytes"]
        elements.append(f'<text x="6" y="{y + 20}">{phase}</text>')
        x = 80.0
        for name, size in sums.items():
            width = 600 * size / total
            elements.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="30"'
                f' fill="{COLOURS[name]}"><title>{name}: {size / 2**30:.1f} GiB</title></rect>'
            )
            x += width
        elements.append(
            f'<rect x="80" y="{y}" width="600" height="30" fill="none" stroke="#94a3b8"/>'
            f'<text x="690" y="{y + 20}">{sum(sums.values()) / 2**30:.1f} GiB</text>'
        )
        y += 44
    y += 8
    for index, (name, colour) in enumerate(COLOURS.items()):
        x, row = 80 + 230 * (index % 3), y + 22 * (index // 3)
        elements.append(f'<rect x="{x}" y="{row}" width="12" height="12" fill="{colour}"/>')
        elements.append(f'<text x="{x + 18}" y="{row + 11}">{name}</text>')
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 200" font-family="sans-serif"'
        ' font-size="14" fill="#64748b">'
    )
    title = f'<text x="80" y="14">of {total / 2**30:.1f} GiB on the card</text>'
    return "\n".join([head, title, *elements, "</svg>", ""])


COLUMNS = {"": 110, "-narrow": 50}
STEPS_SHOWN = 6  # at the start, and the same number at the end
_KEEP_WHITESPACE: dict[str, Any] = {"replace_whitespace": False, "drop_whitespace": False}
_LINE, _CHARACTER, _EDGE = 20, 8.43, 16  # pixels of 14 px monospace


def progress_lines(text: str, columns: int) -> list[str]:
    """The training of ``toolkit demo``'s output as a terminal shows it: the first and the last
    steps. Where the terminal is narrow, lines end at its edge.
    """
    lines = text.split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith("$ toolkit train"))
    stop = next(n for n, line in enumerate(lines) if n > start and line.startswith("report "))
    shown = lines[start : stop + 1]
    steps = [n for n, line in enumerate(shown) if line.startswith("step ")]
    shown[steps[STEPS_SHOWN] : steps[-STEPS_SHOWN]] = ["..."]
    if columns == COLUMNS[""]:
        return [part for line in shown for part in textwrap.wrap(line, columns, **_KEEP_WHITESPACE)]
    return [line if len(line) <= columns else f"{line[: columns - 1]}…" for line in shown]


def progress_drawing(text: str, columns: int) -> str:
    """A terminal with these lines, in SVG; dark, so that it suits light and dark pages."""
    lines = progress_lines(text, columns)
    width = round(columns * _CHARACTER + 2 * _EDGE)
    height = len(lines) * _LINE + 2 * _EDGE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace"'
        ' font-size="14">'
    )
    frame = (
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"'
        ' fill="#0f172a" stroke="#64748b"/>'
    )
    elements = []
    for number, line in enumerate(lines):
        colour = "#7dd3fc" if line.startswith("$ ") else "#e2e8f0"
        length = f' textLength="{len(line) * _CHARACTER:.1f}"' if line.strip() else ""
        elements.append(
            f'<text x="{_EDGE}" y="{_EDGE + 15 + number * _LINE}" xml:space="preserve"'
            f'{length} fill="{colour}">{html.escape(line, quote=False)}</text>'
        )
    return "\n".join([head, frame, *elements, "</svg>", ""])


def write_progress() -> None:
    """The pictures of a run's progress, from demo.txt."""
    text = (PICTURES / "demo.txt").read_text(encoding="utf-8")
    for suffix, columns in COLUMNS.items():
        drawing = progress_drawing(text, columns)
        (PICTURES / f"progress{suffix}.svg").write_text(drawing, encoding="utf-8")


def take_screenshot(
    page: Path, picture: Path, width: int, *, dark: bool = False, height: int = 900
) -> None:
    """A screenshot of a page in a file, by headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is needed: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--force-device-scale-factor=1"]  # fmt: skip
    if dark:
        flags += ["--blink-settings=preferredColorScheme=0"]
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [chromium, *flags, f"--user-data-dir={profile}", f"--window-size={width},{height}",
             f"--screenshot={picture}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


def main() -> None:
    """Write docs/sizing/output.txt, the drawing of it, demo.txt, the progress that it shows and the
    screenshots of the report.

    With the argument ``size`` only what needs no run, which takes a second.
    """
    PICTURES.mkdir(exist_ok=True)
    (SIZING / "output.txt").write_text(sizing_output(), encoding="utf-8")
    (PICTURES / "size.svg").write_text(size_drawing(sizing_json()), encoding="utf-8")
    if sys.argv[1:] == ["size"]:
        write_progress()
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        text = command_output("toolkit", "demo", "--out", str(out)).replace(str(out), "runs/demo")
        (PICTURES / "demo.txt").write_text(text, encoding="utf-8")
        write_progress()
        report = next(out.rglob("report.html"))
        for suffix, width in WIDTHS.items():
            take_screenshot(report, PICTURES / f"report{suffix}.png", width)
        take_screenshot(report, PICTURES / "report-dark.png", WIDTHS[""], dark=True)


if __name__ == "__main__":
    main()
