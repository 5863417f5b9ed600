"""The adapter's copy plan and the KV-only sleep, tested without an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

from toolkit.base.errors import UnsupportedError
from toolkit.engine import sleep
from toolkit.engine.adapter import CopyPlan, LoraLayerCache, find_slot_locations, read_lora_pairs

pytestmark = pytest.mark.engine


class TinyModel(torch.nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 16, bias=False)
        self.o_proj = torch.nn.Linear(16, 8, bias=False)
        self.config = {"model_type": "tiny"}


def tiny_adapter(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **settings)
    policy = get_peft_model(TinyModel(), config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return policy


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"lora_alpha": 4}, 1.0),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 4, "use_rslora": True}, 2.0),
    ],
)
def test_a_float32_adapter_is_copied_into_bfloat16_slots(settings: dict, factor: float) -> None:
    """Values are scaled in float32 and cast once. Only the part of the slot that belongs to the
    adapter's rank is written.
    """
    policy = tiny_adapter(**settings)
    pairs = read_lora_pairs(policy, "default")
    assert [pair.module for pair in pairs] == ["q_proj", "o_proj"]
    before = [(pair.a.clone(), pair.b.clone()) for pair in pairs]
    slots_a = [torch.full((16, pair.a.shape[1]), 7.0, dtype=torch.bfloat16) for pair in pairs]
    slots_b = [torch.full((pair.b.shape[0], 16), 7.0, dtype=torch.bfloat16) for pair in pairs]
    plan = CopyPlan(
        signature=(),
        a_from=[pair.a.detach() for pair in pairs],
        a_to=[slot[:4] for slot in slots_a],
        b_from=[pair.b.detach() for pair in pairs],
        b_to=[slot[:, :4] for slot in slots_b],
        scalings=[pair.scaling for pair in pairs],
    )
    plan.run()
    for pair, (a, b), slot_a, slot_b in zip(pairs, before, slots_a, slots_b, strict=True):
        assert pair.scaling == factor
        assert torch.equal(slot_a[:4], a.bfloat16())
        assert torch.equal(slot_b[:, :4], (b * factor).bfloat16())
        assert bool((slot_a[4:] == 7).all())
        assert bool((slot_b[:, 4:] == 7).all())
        assert torch.equal(pair.a, a)
        assert torch.equal(pair.b, b)


def test_rank_and_alpha_patterns_are_read_from_each_layer() -> None:
    policy = tiny_adapter(lora_alpha=4, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 6})
    assert [(pair.rank, pair.scaling) for pair in read_lora_pairs(policy, "default")] == [
        (4, 1.0),
        (2, 3.0),
    ]


def test_the_cache_finds_the_layers_of_a_replaced_adapter() -> None:
    policy, cache = tiny_adapter(lora_alpha=4), LoraLayerCache()
    first = cache.layers_of(policy, "default")
    assert cache.layers_of(policy, "default") is first
    policy.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"]))
    policy.set_adapter("other")
    policy.delete_adapter("default")
    policy.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]))
    pairs = read_lora_pairs(policy, "default", cache.layers_of(policy, "default"))
    assert [(pair.module, pair.rank) for pair in pairs] == [("q_proj", 2)]
    other = tiny_adapter(lora_alpha=4)
    modules = {id(module) for _, module in cache.layers_of(other, "default")}
    assert modules == {id(other.base_model.model.q_proj), id(other.base_model.model.o_proj)}


def fake_layer(parts: int) -> SimpleNamespace:
    return SimpleNamespace(lora_a_stacked=(None,) * parts, lora_b_stacked=(None,) * parts)


def test_slot_locations_of_fused_and_plain_layers() -> None:
    qkv, fused, plain = fake_layer(3), fake_layer(2), fake_layer(1)
    layers = {"model.0.qkv_proj": qkv, "model.0.gate_up_proj": fused, "model.0.o_proj": plain}
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]}
    module = SimpleNamespace()
    assert find_slot_locations("model.0.v_proj", layers, packed, module) == [(qkv, 2)]
    assert find_slot_locations("model.0.o_proj", layers, packed, module) == [(plain, 0)]
    # One fused layer in Hugging Face has two slots in the engine: A is copied to both, B is split.
    assert find_slot_locations("model.0.gate_up_proj", layers, packed, module) == [
        (fused, 0),
        (fused, 1),
    ]
    with pytest.raises(UnsupportedError, match=r"no LoRA slot for model\.1\.o_proj"):
        find_slot_locations("model.1.o_proj", layers, packed, module)


def test_skipped_and_renamed_modules() -> None:
    plain = fake_layer(1)
    skipping = SimpleNamespace(lora_skip_prefixes=["mtp."])
    with pytest.raises(UnsupportedError, match=r"skips all modules under 'mtp\.'"):
        find_slot_locations("model.mtp.o_proj", {"model.mtp.o_proj": plain}, {}, skipping)
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = WeightsMapper(
        orig_to_new_prefix={"model.": "language_model.model."},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k")},
    )
    renaming = SimpleNamespace(hf_to_vllm_mapper=mapper)
    qkv = fake_layer(3)
    layers = {"language_model.model.0.qkv_proj": qkv}
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    # If the stacked names were applied, q and k would have the same name.
    assert find_slot_locations("model.0.q_proj", layers, packed, renaming) == [(qkv, 0)]
    assert find_slot_locations("model.0.k_proj", layers, packed, renaming) == [(qkv, 1)]


@dataclass
class Allocation:
    tag: str
    handle: tuple[int, int, str, int]  # device, bytes, address, memory
    is_asleep: bool = False


@dataclass
class FakeAllocator:
    pointer_to_data: dict[int, Allocation]
    log: list[str] = field(default_factory=list)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> FakeAllocator:
    fake = FakeAllocator(
        {
            1: Allocation("weights", (0, 10, "w", 0)),
            2: Allocation("kv_cache", (0, 20, "k1", 0)),
            3: Allocation("kv_cache", (0, 30, "k2", 0)),
        }
    )
    parts = (
        fake,
        lambda handle: fake.log.append(f"release {handle[2]}"),
        lambda handle: fake.log.append(f"map {handle[2]}"),
    )
    monkeypatch.setattr(sleep, "_allocator", lambda: parts)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return fake


def test_sleep_releases_only_the_kv_cache(allocator: FakeAllocator) -> None:
    sleep.register()
    sleep.register()
    model_config = SimpleNamespace(sleep_mode_backend=sleep.BACKEND_NAME)
    backend = SleepModeBackendFactory.create_backend(model_config)
    assert isinstance(backend, sleep.KvOnlyBackend)
    for level in (1, 2):
        backend.suspend(level)
    assert allocator.log == ["release k1", "release k2"]  # once, and never the weights
    assert backend.state() == "SUSPENDED"
    backend.resume(["weights"])
    assert len(allocator.log) == 2
    backend.resume(None)
    backend.resume(["kv_cache"])
    assert allocator.log[2:] == ["map k1", "map k2"]
    assert backend.state() == "RUNNING"
    backend.discard(("weights",))
    assert len(allocator.log) == 4
    backend.discard(("weights", "kv_cache"))
    assert allocator.log[4:] == ["release k1", "release k2"]
    assert type(backend).preserves_compiled_artifacts()
    assert type(backend).preserves_communicators()


def test_waking_first_empties_torchs_cache(
    allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: allocator.log.append("hand back"))
    sleep.map_tag("kv_cache")
    assert allocator.log == []  # awake: nothing to do
    sleep.release_tag("kv_cache")
    sleep.map_tag("kv_cache")
    assert allocator.log[2:] == ["hand back", "map k1", "map k2"]


def test_the_switch_chooses_our_backend_and_is_idempotent() -> None:
    calls: list[Any] = []
    model_config = SimpleNamespace(sleep_mode_backend="cumem")
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config)),
        sleep=lambda level: calls.append(("sleep", level)),
        wake_up=lambda: calls.append("wake"),
    )
    switch = sleep.KvSleep(llm)
    assert model_config.sleep_mode_backend == sleep.BACKEND_NAME
    switch.wake()
    switch.sleep()
    switch.sleep()
    switch.wake()
    switch.wake()
    assert calls == [("sleep", 1), "wake"]
