"""tensorboard.png: the demo run in TensorBoard. Needs ``pip install playwright`` and a Chromium.

    toolkit demo --out runs/demo
    toolkit train runs/demo/run.yaml --set grpo.report_to=tensorboard \\
        --set runtime.output_dir=runs/tracked/addition
    tensorboard --logdir runs/tracked --port 6106 &
    python docs/pictures/tensorboard.py docs/pictures/tensorboard.png [CHROMIUM]
"""

from __future__ import annotations

import sys

from playwright.sync_api import sync_playwright

ADDRESS = "http://localhost:6106/#timeseries"
SHOWN = "^(reward|reward_std|entropy|completion_length|timing/step_s|timing/tokens_per_s)$"
WAIT_MS = 120_000
DRAWN_MS = 15_000


def main(out: str, chromium: str | None = None) -> None:
    """Open the page, show six curves, write ``out``."""
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1500, "height": 960})
        page.goto(ADDRESS, timeout=WAIT_MS)
        tags = page.locator("tb-filter-input[placeholder*=tags] input").first
        tags.wait_for(timeout=WAIT_MS)
        page.get_by_role("button", name="Settings").last.click(timeout=WAIT_MS)
        tags.fill(SHOWN)
        page.keyboard.press("Escape")  # the list of suggestions
        page.wait_for_timeout(DRAWN_MS)
        page.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
