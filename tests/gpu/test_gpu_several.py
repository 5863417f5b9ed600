"""Several visible GPUs: one process trains on the first GPU, ``--nproc-per-node auto`` on all
GPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("processes", [None, "auto"])
def test_a_run_with_several_visible_gpus(
    tmp_path: Path, engine: str, processes: str | None
) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "acceptance"))
    from train_world import make_run_files, run_toolkit

    run_file = make_run_files(tmp_path, engine=engine, steps=2)
    options = [] if processes is None else ["--nproc-per-node", processes]
    result = run_toolkit("train", str(run_file), *options, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    count = torch.cuda.device_count()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["world_size"] == (count if processes else 1)
    assert manifest["base"]["unchanged"] is True
    hint = f"uses GPU 0 of {count} visible GPUs"
    assert (hint in result.stdout) is (processes is None)
