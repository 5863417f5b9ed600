"""The parser of Prometheus reads the metrics. A value that is not known has no metric."""

from __future__ import annotations

import cases
from prometheus_client.parser import text_string_to_metric_families

from toolkit.gpu.checks import run_checks
from toolkit.gpu.prometheus import format_metrics
from toolkit.gpu.snapshot_json import node_from_json


def metric_samples(name: str) -> dict[tuple[str, str], float]:
    snapshot = node_from_json(cases.load(name).node)
    text = format_metrics(snapshot, run_checks(snapshot), 3)
    return {
        (sample.name, sample.labels.get("check") or sample.labels.get("gpu", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels.get("slice")
    }


def test_a_lost_card_has_no_values_and_gpu_answers_0() -> None:
    found = metric_samples("h100x8-lost")
    assert found["envcheck_gpu_answers", "5"] == 0
    assert found["envcheck_gpu_answers", "4"] == 1
    assert ("envcheck_gpu_memory_free_bytes", "5") not in found
    assert found["envcheck_gpu_memory_total_bytes", "4"] == 81559 << 20
    assert found["envcheck_check", "health.lost"] == 2
    assert found["envcheck_exit_code", ""] == 3


def test_units_are_base_units() -> None:
    found = metric_samples("h200-healthy")
    assert found["envcheck_gpu_power_watts", "0"] == 76
    assert found["envcheck_gpu_utilization_ratio", "0"] == 0
    assert found["envcheck_gpu_fabric_state", "0"] == 0


def test_labels_are_escaped() -> None:
    node = cases.base("h200")
    node["gpus"][0]["name"] = {"value": 'a "quoted" \\ name\nand a line'}
    text = format_metrics(node_from_json(node))
    (family,) = [
        one
        for one in text_string_to_metric_families(text)
        if one.name == "envcheck_gpu_memory_total_bytes"
    ]
    assert family.samples[0].labels["name"] == 'a "quoted" \\ name\nand a line'
