"""The output of envcheck size: a bar ends at the memory of the card, and the report says for each
value whether the run file or the sizer has set it.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from toolkit.cli.size_report import format_report
from toolkit.sizing import solve

BAR = re.compile(r"\[([A-Za-z.!]+)\] ([\d.]+) of ([\d.]+) GiB")


@pytest.mark.parametrize("name", ["t4", "3080", "4090", "h100", "b200", "h200:1g.18gb"])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"])
def test_a_bar_ends_at_the_memory_of_the_card(spec_of, card, run, monkeypatch, name, model):
    """Small terms are visible and do not make the bar longer. ``!`` appears only if the terms need
    more memory than the card has.
    """
    for width in (60, 80, 120):
        monkeypatch.setattr("toolkit.cli.size_report.terminal_width", lambda width=width: width)
        for share in (1.0, 0.4):
            device = card(name)
            device = replace(device, free_bytes=int(device.free_bytes * share))
            result = solve(run(), spec_of(model), device)
            bars = BAR.findall(format_report(result, run()))
            assert len(bars) == 2
            for bar, taken, whole in bars:
                assert len(bar) == width - 36
                assert ("!" in bar) == (float(taken) > float(whole)) or taken == whole
                assert all(letter in bar for letter in "CWT" if letter != "T" or bar is bars[1][0])


def test_the_report_says_who_set_each_value(spec_of, card, run):
    spec, device = spec_of("Qwen/Qwen2.5-0.5B"), card("h100")
    config = run(gpu_memory_utilization=0.5, max_lora_rank=32)
    text = format_report(solve(config, spec, device), config)
    assert re.search(r"gpu_memory_utilization from .* to .*, written .*0\.500", text)
    assert re.search(r"model\.max_lora_rank +32 +written", text)
    assert re.search(r"model\.max_num_seqs +\d+ +chosen", text)
    auto = format_report(solve(run(), spec, device), run())
    assert ", chosen " in auto.split("\n\n")[1]
