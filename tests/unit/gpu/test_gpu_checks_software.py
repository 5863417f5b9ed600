"""Checks of the installed software: the versions of a lock file, and libnuma for vLLM on a CPU."""

from __future__ import annotations

from dataclasses import replace

from check_helpers import recorded_snapshot, run_check

from toolkit.gpu.checks import CheckContext, checks_by_id
from toolkit.gpu.reading import NOT_QUERIED


def test_installed_versions_are_compared_with_the_lock() -> None:
    snapshot = recorded_snapshot("h200-healthy")
    held = CheckContext(lock={"trl": "1.16.0", "absent": "1"})
    same = run_check(snapshot, "software.lock", held)
    assert same.evidence == "checked 1 package: each has the version in the lock file"
    off = run_check(snapshot, "software.lock", CheckContext(lock={"trl": "1.15.0"}))
    assert off.evidence == "trl 1.16.0 (lock: 1.15.0)"


def test_libnuma_is_checked_only_for_the_cpu_build_of_vllm() -> None:
    snapshot = recorded_snapshot("cpu-no-libnuma")
    check = checks_by_id()["software.libnuma"]
    assert run_check(snapshot, check.id).verdict == "warn"  # no run file asks for vLLM
    assert check.run(snapshot, CheckContext(configured=True, engine="transformers")) is None
    assert check.run(recorded_snapshot("h200-healthy"), CheckContext()) is None
    unasked = replace(snapshot, software=replace(snapshot.software, libnuma=NOT_QUERIED))
    assert run_check(unasked, check.id).verdict == "unknown"  # an older recording
