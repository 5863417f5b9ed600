"""Processes that share a model: the checks before an engine starts, and the facts about the
processes that a checkpoint records.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.base.errors import ConfigError, NodeError
from toolkit.engine.group_checks import (
    SHARED_LIBRARIES,
    check_groups,
    check_same_environment,
    check_world_size,
)
from toolkit.engine.mesh import current_mesh, run_on_first
from toolkit.engine.shards import full_shape, gather_full_tensor, local_shard
from toolkit.policy.tensor_parallel.functions import clip_split_grad_norm
from toolkit.train.checkpointing import checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def set_launcher_variables(monkeypatch: pytest.MonkeyPatch, world: int, local_world: int) -> None:
    for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", local_world), ("RANK", 0)):
        monkeypatch.setenv(name, str(value))


def process_facts(card: str = "H100", **changes: str) -> dict[str, Any]:
    return dict.fromkeys(SHARED_LIBRARIES, "1") | {"card": card} | changes


def test_a_group_must_be_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher_variables(monkeypatch, 6, 3)
    with pytest.raises(ConfigError, match="a group of 2 processes that share a model") as refused:
        check_world_size(2)
    assert "6 processes, and 3 of them" in refused.value.message
    set_launcher_variables(monkeypatch, 8, 4)
    check_world_size(2)


def test_a_group_needs_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="the number of processes must be a multiple of 2"):
        check_groups(2, None, lambda own: [own])
    check_groups(1, None, lambda own: [own])


def test_a_group_needs_equal_library_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher_variables(monkeypatch, 2, 2)
    check_groups(2, "H100", lambda own: [own, own])
    with pytest.raises(NodeError, match="different versions of torch") as refused:
        check_groups(2, "H100", lambda own: [own, {**own, "torch": "2"}])
    assert f"process 0: {version('torch')}, process 1: 2" in refused.value.message


def test_a_group_needs_gpus_of_one_kind() -> None:
    facts_by_process = [
        process_facts("A100"),
        process_facts("A100"),
        process_facts("H100"),
        process_facts("H100"),
    ]
    check_same_environment(2, facts_by_process)  # different replicas may use different GPUs
    with pytest.raises(ConfigError, match="cards of different kinds") as refused:
        check_same_environment(4, facts_by_process)
    assert "process 1: A100, process 2: H100" in refused.value.message
    assert "CUDA_VISIBLE_DEVICES" in str(refused.value.fix)


@pytest.mark.parametrize(
    ("recorded_replicas", "current_replicas", "size", "message", "fix"),
    [
        (2, 1, 1, "written by 2 processes, but this run has 1", "--nproc-per-node 2"),
        (1, 2, 1, "written by 1 process, but this run has 2", "--nproc-per-node 1"),
        (2, 1, 2, "written by 2 replicas, but this run has 1", "--nproc-per-node 4"),
    ],
)
def test_a_checkpoint_of_another_number_of_replicas_is_refused(
    tmp_path: Path, recorded_replicas: int, current_replicas: int, size: int, message: str, fix: str
) -> None:
    (tmp_path / checkpoint.STATE_FILE).write_text(json.dumps({"world_size": recorded_replicas}))
    with pytest.raises(ConfigError, match=message) as refused:
        checkpoint.check_replica_count(tmp_path, current_replicas, size)
    assert fix in str(refused.value.fix)
    checkpoint.check_replica_count(tmp_path, recorded_replicas, size)


def test_a_checkpoint_records_the_tensor_parallel_size(tmp_path: Path) -> None:
    for state, size in (({}, 1), ({"tensor_parallel_size": 2}, 2)):
        (tmp_path / checkpoint.STATE_FILE).write_text(json.dumps(state))
        assert checkpoint.tensor_parallel_size_of(tmp_path) == size


def test_a_single_process_has_whole_tensors() -> None:
    assert current_mesh() is None
    assert run_on_first(lambda: 7) == 7
    tensor = torch.ones(2, 3, requires_grad=True)
    assert gather_full_tensor(tensor) is tensor
    assert local_shard(tensor, tensor) is tensor
    assert full_shape(tensor) == (2, 3)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_the_gradient_norm_equals_that_of_torch(max_norm: float) -> None:
    tensors = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(3)]
    copies = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(3)]
    # The last tensor has no gradient.
    for tensor, copied in zip(tensors[:2], copies[:2], strict=True):
        tensor.grad = torch.randn(3, 2)
        copied.grad = tensor.grad.clone()
    clipped_norm, torch_norm = (
        clip_split_grad_norm(tensors, max_norm),
        torch.nn.utils.clip_grad_norm_(copies, max_norm),
    )
    assert torch.allclose(clipped_norm, torch_norm)
    for tensor, copied in zip(tensors[:2], copies[:2], strict=True):
        assert torch.allclose(tensor.grad, copied.grad)
    assert clip_split_grad_norm(tensors[2:], max_norm) == 0
