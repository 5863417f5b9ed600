"""Files of the model and dataset are truncated, overwritten or removed while a run uses them."""

from __future__ import annotations

import os
import shutil

import pytest
import train_world as world
from test_run_lost import at_step

pytestmark = pytest.mark.slow
CHANGES = {
    "cut short": lambda file: os.truncate(file, min(64, file.stat().st_size)),
    "written over": lambda file: file.write_bytes(b"\xff" * file.stat().st_size),
    "removed": lambda file: file.unlink(),
}


@pytest.fixture(
    scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.engine)]
)
def undisturbed(request, tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    if request.param == "vllm":
        pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("w") / "world"
    run_file = world.make_run_files(folder, steps=5, engine=request.param)
    out = folder / "out.txt"
    assert world.wait_for_exit(world.fork_run(run_file, out, evaluate=True)) == 0, out.read_text()
    return run_file, world.result_digests(folder / "run")


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_unaffected_when_its_input_files_change(undisturbed, tmp_path, change):
    run_file, expected = undisturbed
    folder, run_dir = tmp_path / "world", tmp_path / "run"
    shutil.copytree(run_file.parent, folder, ignore=shutil.ignore_patterns("run", "*.txt"))
    used = [*(folder / "model").iterdir(), *folder.glob("*.jsonl")]

    def spoil():
        for file in used:
            CHANGES[change](file)

    out = tmp_path / "out.txt"
    pid = world.fork_run(
        folder / "run.yaml",
        out,
        f'runtime.output_dir="{run_dir}"',
        before=at_step(3, spoil),
        evaluate=True,
    )
    code = world.wait_for_exit(pid)
    output = out.read_text()
    assert code in (0, 2), output
    assert output.count("error: ") == (code != 0), output
    assert "Traceback" not in output
    if code == 0:
        assert world.result_digests(run_dir) == expected
