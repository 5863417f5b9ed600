"""``envcheck check`` and ``envcheck probe``, as installed, on every recorded node. pynvml calls a
fake NVML library, which answers with the recorded values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from toolkit.config.validate import check_instance

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import cases


@pytest.mark.parametrize("name", cases.names())
def test_the_output_of_check_and_probe_matches_the_snapshot(name: str, tmp_path: Path) -> None:
    case = cases.load(name)
    config = case.run_file(tmp_path)
    chosen = (*case.arguments, *(("--config", str(config)) if config else ()))

    checked = case.envcheck(tmp_path, "check", "--json", *chosen)
    assert checked.stderr == ""
    report = json.loads(checked.stdout)
    not_ok = {row["id"]: row["verdict"] for row in report["checks"] if row["verdict"] != "ok"}
    assert not_ok == case.expect["not_ok"], case.title
    assert checked.returncode == report["exit_code"] == case.expect["exit_code"]
    assert check_instance(report, "report") == []

    # The values that were read from the fake NVML through pynvml are the recorded values.
    assert [gpu["state"] for gpu in report["gpus"]] == [gpu["state"] for gpu in case.node["gpus"]]
    for gpu, recorded in zip(report["gpus"], case.node["gpus"], strict=True):
        for field in ("name", "memory", "processes", "fabric", "remapped_rows", "nvlinks"):
            if field in recorded and "value" in recorded[field]:
                assert gpu[field] == recorded[field], field

    if case.quirks or case.expect["probe_exit_code"] or "lost" in name or "mig" in name:
        probed = case.envcheck(tmp_path, "probe", "--json")
        assert probed.returncode == case.expect["probe_exit_code"], probed.stderr
        seen = json.loads(probed.stdout)
        assert check_instance(seen, "report") == []
        assert seen["gpus"] == report["gpus"]
