"""A recording has no names of users or hosts, and its checks have the same verdicts everywhere."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.base.errors import InputError
from toolkit.config.validate import check_instance
from toolkit.gpu.checks import CheckContext, run_checks
from toolkit.gpu.record import make_recording, parse_recording, redact
from toolkit.gpu.report import probe_report
from toolkit.gpu.snapshot_json import node_from_json

NAMES = {"/home/anna": "~", "anna": "USER", "node7.example.org": "HOST", "node7": "HOST"}


@pytest.mark.parametrize("name", cases.names())
def test_a_recording_gets_the_verdicts_of_its_node(name: str) -> None:
    snapshot = node_from_json(cases.load(name).node)
    context = CheckContext(required_gpus=1, engine="vllm")
    results = run_checks(snapshot, context)
    data = json.loads(json.dumps(make_recording(snapshot, context, results)))
    # The next test checks the schema for a node with GPUs.
    if not snapshot.gpus or any(gpu.slices for gpu in snapshot.gpus):
        assert check_instance(data, "report") == []
    again, parsed_context, verdicts = parse_recording(data)
    assert parsed_context == context
    assert {one.id: one.verdict for one in run_checks(again, parsed_context)} == verdicts
    assert verdicts == {one.id: one.verdict for one in results}


def test_a_recording_matches_the_schema() -> None:
    snapshot = node_from_json(cases.load("h100x8-lost").node)
    data = make_recording(snapshot, CheckContext(), run_checks(snapshot))
    assert check_instance(data, "report") == []


def test_invented_uuids_still_select_their_cards() -> None:
    uuid = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    first, second, short, other = redact(
        [uuid, f"MIG-{uuid}/5/0", "GPU-8932f937-d7", uuid.replace("8932", "8933")], {}
    )
    assert first != uuid
    assert len(first) == len(uuid)
    assert second == f"MIG-{first}/5/0"
    assert first.startswith(short)
    assert other[:9] != first[:9] or other != first


def test_the_same_uuid_differs_between_recordings() -> None:
    uuid = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    assert redact(uuid, {}) != redact(uuid, {})


def test_pids_names_users_and_hosts_are_removed() -> None:
    process = {"pid": 31337, "name": "anna_secret.py", "used_bytes": 5, "mine": False}
    data = {
        "processes": [process, {**process, "pid": 4242}, process],
        "path": "/home/anna/.cache on node7.example.org, node7 and anna",
        "environment": {"SLURM_JOB_ID": "887766"},
        "reason": "uid 12345 has no account",
        "kept": "/home/annabel/annotations",
    }
    found = redact(data, NAMES)
    assert [row["pid"] for row in found["processes"]] == [1, 2, 1]
    assert {row["name"] for row in found["processes"]} == {None}
    assert found["path"] == "~/.cache on HOST, HOST and USER"
    assert found["environment"] == {"SLURM_JOB_ID": "1"}
    assert found["reason"] == "uid N has no account"
    assert found["kept"] == "/home/annabel/annotations"
    short = redact({"path": "/net/node7.example.org/runs, node77"}, {"node7": "HOST"})
    assert short == {"path": "/net/HOST/runs, node77"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"kind": "record"},
        {"kind": "record", "node": {}},
        {"kind": "record", "node": 3},
    ],
)
def test_other_data_is_refused_as_a_recording(data: Any) -> None:
    with pytest.raises(InputError, match="not a recording"):
        parse_recording(data)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict | list):
        return [path]
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(found for key, part in parts for found in paths_in(part, (*path, key)))]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_data_that_matches_the_schema_can_be_checked(data: st.DataObject) -> None:
    """One value of a valid recording is replaced. Either the schema refuses the recording, or every
    check has a result.
    """
    snapshot = node_from_json(cases.load("h200-tenant").node)
    good = make_recording(snapshot, CheckContext(), run_checks(snapshot))
    path = data.draw(st.sampled_from([p for p in paths_in(good["node"]) if len(p) > 1]))
    parent = good["node"]
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(_ANY)
    if check_instance(good, "report") == []:
        again, context, _ = parse_recording(good)
        assert run_checks(again, context)
        assert probe_report(again)["kind"] == "probe"


_ANY = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(_ANY, st.sampled_from(["driver", "gpus", "environment", "host", "software", "model"]))
def test_a_damaged_recording_is_refused_or_read(value: Any, part: str) -> None:
    node = cases.base("h200")
    node[part] = value
    with suppress(InputError):
        snapshot, context, _ = parse_recording({"kind": "record", "node": node})
        assert run_checks(snapshot, context, only=["driver.present"])
