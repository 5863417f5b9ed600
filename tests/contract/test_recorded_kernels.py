"""The list of recorded kernels belongs to the versions in the CUDA lock file. If a version has
changed, record the kernels again on a GPU (tests/gpu/record_kernels.py).
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from toolkit.engine.kernel_records import records_file

pytestmark = pytest.mark.contract

CUDA_LOCK = Path(__file__).parents[2] / "locks" / "cu130.txt"


def locked_version(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)", CUDA_LOCK.read_text(), re.MULTILINE)
    assert match, package
    return match[1]


def recorded_list() -> dict[str, Any]:
    path = records_file(locked_version("vllm"))
    assert path.is_file(), "no kernels are recorded for the vLLM of the CUDA lock file"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def records() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = recorded_list()["kernels"]
    return found


def test_the_list_was_recorded_with_the_locked_versions() -> None:
    versions = recorded_list()["versions"]
    assert versions == {package: locked_version(package) for package in versions}
    assert set(versions) == {"vllm", "triton", "trl", "liger-kernel"}


def test_the_list_has_kernels_of_every_library() -> None:
    libraries = {record["module"].partition(".")[0] for record in records()}
    assert libraries == {"vllm", "trl", "liger_kernel"}
    assert len({json.dumps(record) for record in records()}) == len(records())


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_the_kernels_of_trl_have_the_recorded_parameters(kernel: str) -> None:
    record = next(record for record in records() if record["kernel"] == kernel)
    function = getattr(import_module(record["module"]), kernel)
    assert list(record["variant"]["signature"]) == function.arg_names


def test_triton_can_compile_from_a_record() -> None:
    from triton.runtime.jit import JITFunction

    assert callable(JITFunction.preload)
    assert locked_version("triton") == "3.6.0", "read JITFunction.preload of the new version"
