"""Slices of fused tensors, from names and shapes alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.base.errors import UnsupportedError
from toolkit.policy.weight_names import EngineTensors, Slice, expected_checkpoint_names, plan_views

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def same(name: str) -> str:
    return name


def test_parts_follow_one_another_in_the_mappings_order() -> None:
    wanted = {
        "a.v_proj.weight": (4, 8),
        "a.q_proj.weight": (16, 8),
        "a.k_proj.weight": (4, 8),
        "a.q_proj.bias": (16,),
        "a.k_proj.bias": (4,),
        "a.v_proj.bias": (4,),
        "a.o_proj.weight": (8, 16),
    }
    sources = EngineTensors(
        {"a.qkv_proj.weight": (24, 8), "a.qkv_proj.bias": (24,), "a.o_proj.weight": (8, 16)}, PACKED
    )
    plan = plan_views(wanted, [], sources, same)
    assert plan["a.q_proj.weight"] == Slice("a.qkv_proj.weight", 0, 16)
    assert plan["a.k_proj.weight"] == Slice("a.qkv_proj.weight", 16, 4)
    assert plan["a.v_proj.bias"] == Slice("a.qkv_proj.bias", 20, 4)
    assert plan["a.o_proj.weight"] == Slice("a.o_proj.weight", 0, 8)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(1, 9))
def test_parts_cover_the_fused_tensor_without_gap_or_overlap(rows: list[int], width: int) -> None:
    parts = [f"part{i}" for i in range(len(rows))]
    wanted = {f"m.{part}.weight": (row, width) for part, row in zip(parts, rows, strict=True)}
    sources = EngineTensors({"m.fused.weight": (sum(rows), width)}, {"fused": parts})
    plan = plan_views(wanted, [], sources, same)
    covered = [row for s in plan.values() for row in range(s.start, s.start + s.rows)]
    assert sorted(covered) == list(range(sum(rows)))


def test_what_hugging_face_fused_stays_fused() -> None:
    sources = EngineTensors({"a.qkv_proj.weight": (24, 8)}, {"qkv_proj": ("qkv_proj",)})
    plan = plan_views({"a.qkv_proj.weight": (24, 8)}, [], sources, same)
    assert plan == {"a.qkv_proj.weight": Slice("a.qkv_proj.weight", 0, 24)}


def test_only_vocabulary_layers_may_be_padded() -> None:
    wanted = {"embed.weight": (100, 8)}
    padded = EngineTensors({"embed.weight": (128, 8)}, {}, frozenset({"embed.weight"}))
    assert plan_views(wanted, [], padded, same)["embed.weight"] == Slice("embed.weight", 0, 100)
    with pytest.raises(UnsupportedError, match=r"shape is \[100, 8\] in the model, but \[128, 8\]"):
        plan_views(wanted, [], EngineTensors({"embed.weight": (128, 8)}, {}), same)
    with pytest.raises(UnsupportedError, match="shape"):
        plan_views({"embed.weight": (129, 8)}, [], padded, same)


def test_a_tied_name_takes_the_place_of_the_one_that_is_there() -> None:
    wanted = {"embed.weight": (100, 8), "lm_head.weight": (100, 8)}
    sources = EngineTensors({"embed.weight": (128, 8)}, {}, frozenset({"embed.weight"}))
    plan = plan_views(wanted, [frozenset(wanted)], sources, same)
    assert plan["lm_head.weight"] == plan["embed.weight"]
    with pytest.raises(
        UnsupportedError, match=r"lm_head\.weight: the engine does not have this tensor"
    ):
        plan_views(wanted, [], sources, same)


def test_tied_names_are_one_slice_where_the_engine_lists_both() -> None:
    wanted = {"embed.weight": (100, 8), "lm_head.weight": (100, 8)}
    sources = EngineTensors(dict.fromkeys(wanted, (128, 8)), {}, frozenset(wanted))
    tied = plan_views(wanted, [frozenset(wanted)], sources, same)
    assert tied["lm_head.weight"] == tied["embed.weight"] == Slice("embed.weight", 0, 100)
    untied = plan_views(wanted, [], sources, same)
    assert untied["lm_head.weight"] == Slice("lm_head.weight", 0, 100)


def test_names_go_through_the_models_own_mapping() -> None:
    sources = EngineTensors({"language_model.model.a.qkv_proj.weight": (6, 2)}, PACKED)
    wanted = {f"model.a.{part}.weight": (2, 2) for part in PACKED["qkv_proj"]}
    plan = plan_views(wanted, [], sources, lambda name: f"language_model.{name}")
    assert plan["model.a.v_proj.weight"] == Slice("language_model.model.a.qkv_proj.weight", 4, 2)


@pytest.mark.parametrize("inner", ["routed_experts.", ""])
def test_stacked_experts(inner: str) -> None:
    wanted = {"m.experts.gate_up_proj": (4, 6, 2), "m.experts.down_proj": (4, 2, 3)}
    shapes = {f"m.experts.{inner}w13_weight": (4, 6, 2), f"m.experts.{inner}w2_weight": (4, 2, 3)}
    plan = plan_views(wanted, [], EngineTensors(shapes, PACKED), same)
    assert plan["m.experts.down_proj"] == Slice(f"m.experts.{inner}w2_weight", 0, 4)


def test_stored_names_spell_experts_as_the_checkpoint_does() -> None:
    wanted = {"m.experts.down_proj": (2, 2, 3), "m.gate.weight": (2, 2)}
    assert expected_checkpoint_names(wanted, ["m.experts.down_proj"]) == set(wanted)
    read = ["model.m.experts.0.w2.weight", "model.m.experts.0.w1.weight", "model.m.gate.weight"]
    assert expected_checkpoint_names(wanted, read) == {
        "m.gate.weight",
        *(f"m.experts.{index}.{tail}.weight" for index in (0, 1) for tail in ("w1", "w2")),
    }


@pytest.mark.parametrize(
    ("wanted", "shapes", "text"),
    [
        (
            {"a.q_proj.weight": (2, 2)},
            {"a.qkv_proj.weight": (6, 2)},
            "also contains k_proj, v_proj",
        ),
        (
            {f"a.{p}.weight": (2, 2) for p in PACKED["qkv_proj"]},
            {"a.qkv_proj.weight": (8, 2)},
            "do not add up to",
        ),
        ({"a.norm.weight": (2,)}, {}, "does not have this tensor"),
    ],
)
def test_what_cannot_be_shared_says_why(wanted: dict, shapes: dict, text: str) -> None:
    with pytest.raises(UnsupportedError, match=text) as caught:
        plan_views(wanted, [], EngineTensors(shapes, PACKED), same)
    assert "share_weights: false" in str(caught.value)


def test_a_tensor_that_the_engine_rewrote_is_refused_and_the_list_is_cut() -> None:
    wanted = {f"a{i}.weight": (2, 2) for i in range(8)}
    sources = EngineTensors(dict(wanted), {}, rewritten_names=frozenset(wanted))
    with pytest.raises(UnsupportedError, match=r"has rewritten a0\.weight .*\(and 3 more\)"):
        plan_views(wanted, [], sources, same)
