"""Make the pictures and outputs that the documentation shows: ``just docs-pictures``.

Everything comes from real output: a run of ``toolkit demo``, its report, and ``envcheck size`` on
the example of sizing.md. Needs Chromium (Debian's package ``chromium``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
SIZING = DOCS / "sizing"
WIDTHS = {"": 1100, "-narrow": 480}


def command(*words: str, cwd: Path = DOCS.parent) -> str:
    """The output of one of our commands, as a terminal of 100 columns shows it."""
    environ = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def sizing_output() -> str:
    """What sizing.md shows: ``envcheck size run.yaml --gpu h100`` in docs/sizing."""
    return command("toolkit.cli.envcheck", "size", "run.yaml", "--gpu", "h100", cwd=SIZING)


def shoot(page: Path, picture: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
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
    """Write docs/sizing/output.txt, docs/pictures/demo.txt and the screenshots of the report."""
    PICTURES.mkdir(exist_ok=True)
    (SIZING / "output.txt").write_text(sizing_output(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        text = command("toolkit", "demo", "--out", str(out)).replace(str(out), "runs/demo")
        (PICTURES / "demo.txt").write_text(text, encoding="utf-8")
        report = next(out.rglob("report.html"))
        for suffix, width in WIDTHS.items():
            shoot(report, PICTURES / f"report{suffix}.png", width)
        shoot(report, PICTURES / "report-dark.png", WIDTHS[""], dark=True)


if __name__ == "__main__":
    main()
