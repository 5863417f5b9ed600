"""Slices of fused tensors, planned only from names and shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.base.errors import UnsupportedError
from toolkit.policy.weight_names import EngineTensors, Slice, expected_checkpoint_names, plan_slices

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def identity(name: str) -> str:
    return name


def test_parts_have_consecutive_rows_in_the_order_of_the_mapping() -> None:
    parameter_shapes = {
        "a.v_proj.weight": (4, 8),
        "a.q_proj.weight": (16, 8),
        "a.k_proj.weight": (4, 8),
        "a.q_proj.bias": (16,),
        "a.k_proj.bias": (4,),
        "a.v_proj.bias": (4,),
        "a.o_proj.weight": (8, 16),
    }
    tensors = EngineTensors(
        {"a.qkv_proj.weight": (24, 8), "a.qkv_proj.bias": (24,), "a.o_proj.weight": (8, 16)}, PACKED
    )
    plan = plan_slices(parameter_shapes, [], tensors, identity)
    assert plan["a.q_proj.weight"] == Slice("a.qkv_proj.weight", 0, 16)
    assert plan["a.k_proj.weight"] == Slice("a.qkv_proj.weight", 16, 4)
    assert plan["a.v_proj.bias"] == Slice("a.qkv_proj.bias", 20, 4)
    assert plan["a.o_proj.weight"] == Slice("a.o_proj.weight", 0, 8)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(1, 9))
def test_parts_cover_the_fused_tensor_without_gap_or_overlap(rows: list[int], width: int) -> None:
    parts = [f"part{i}" for i in range(len(rows))]
    parameter_shapes = {
        f"m.{part}.weight": (row, width) for part, row in zip(parts, rows, strict=True)
    }
    tensors = EngineTensors({"m.fused.weight": (sum(rows), width)}, {"fused": parts})
    plan = plan_slices(parameter_shapes, [], tensors, identity)
    covered = [row for s in plan.values() for row in range(s.start, s.start + s.rows)]
    assert sorted(covered) == list(range(sum(rows)))


def test_a_layer_that_hugging_face_fuses_gets_all_rows() -> None:
    tensors = EngineTensors({"a.qkv_proj.weight": (24, 8)}, {"qkv_proj": ("qkv_proj",)})
    plan = plan_slices({"a.qkv_proj.weight": (24, 8)}, [], tensors, identity)
    assert plan == {"a.qkv_proj.weight": Slice("a.qkv_proj.weight", 0, 24)}


def test_only_vocabulary_layers_may_be_padded() -> None:
    parameter_shapes = {"embed.weight": (100, 8)}
    padded = EngineTensors({"embed.weight": (128, 8)}, {}, frozenset({"embed.weight"}))
    assert plan_slices(parameter_shapes, [], padded, identity)["embed.weight"] == Slice(
        "embed.weight", 0, 100
    )
    with pytest.raises(UnsupportedError, match=r"shape is \[100, 8\] in the model, but \[128, 8\]"):
        plan_slices(parameter_shapes, [], EngineTensors({"embed.weight": (128, 8)}, {}), identity)
    with pytest.raises(UnsupportedError, match="shape"):
        plan_slices({"embed.weight": (129, 8)}, [], padded, identity)


def test_a_tied_name_gets_the_slice_of_the_name_that_the_engine_has() -> None:
    parameter_shapes = {"embed.weight": (100, 8), "lm_head.weight": (100, 8)}
    tensors = EngineTensors({"embed.weight": (128, 8)}, {}, frozenset({"embed.weight"}))
    plan = plan_slices(parameter_shapes, [frozenset(parameter_shapes)], tensors, identity)
    assert plan["lm_head.weight"] == plan["embed.weight"]
    with pytest.raises(
        UnsupportedError, match=r"lm_head\.weight: the engine does not have this tensor"
    ):
        plan_slices(parameter_shapes, [], tensors, identity)


def test_tied_names_get_one_slice_if_the_engine_has_both_names() -> None:
    parameter_shapes = {"embed.weight": (100, 8), "lm_head.weight": (100, 8)}
    tensors = EngineTensors(
        dict.fromkeys(parameter_shapes, (128, 8)), {}, frozenset(parameter_shapes)
    )
    tied = plan_slices(parameter_shapes, [frozenset(parameter_shapes)], tensors, identity)
    assert tied["lm_head.weight"] == tied["embed.weight"] == Slice("embed.weight", 0, 100)
    untied = plan_slices(parameter_shapes, [], tensors, identity)
    assert untied["lm_head.weight"] == Slice("lm_head.weight", 0, 100)


def test_names_are_renamed_to_the_engines_names() -> None:
    tensors = EngineTensors({"language_model.model.a.qkv_proj.weight": (6, 2)}, PACKED)
    parameter_shapes = {f"model.a.{part}.weight": (2, 2) for part in PACKED["qkv_proj"]}
    plan = plan_slices(parameter_shapes, [], tensors, lambda name: f"language_model.{name}")
    assert plan["model.a.v_proj.weight"] == Slice("language_model.model.a.qkv_proj.weight", 4, 2)


@pytest.mark.parametrize("inner", ["routed_experts.", ""])
def test_stacked_experts(inner: str) -> None:
    parameter_shapes = {"m.experts.gate_up_proj": (4, 6, 2), "m.experts.down_proj": (4, 2, 3)}
    shapes = {f"m.experts.{inner}w13_weight": (4, 6, 2), f"m.experts.{inner}w2_weight": (4, 2, 3)}
    plan = plan_slices(parameter_shapes, [], EngineTensors(shapes, PACKED), identity)
    assert plan["m.experts.down_proj"] == Slice(f"m.experts.{inner}w2_weight", 0, 4)


def test_expected_names_of_experts_follow_the_checkpoint() -> None:
    parameter_shapes = {"m.experts.down_proj": (2, 2, 3), "m.gate.weight": (2, 2)}
    assert expected_checkpoint_names(parameter_shapes, ["m.experts.down_proj"]) == set(
        parameter_shapes
    )
    checkpoint_names = [
        "model.m.experts.0.w2.weight",
        "model.m.experts.0.w1.weight",
        "model.m.gate.weight",
    ]
    assert expected_checkpoint_names(parameter_shapes, checkpoint_names) == {
        "m.gate.weight",
        *(
            f"m.experts.{index}.{tensor_name}.weight"
            for index in (0, 1)
            for tensor_name in ("w1", "w2")
        ),
    }


@pytest.mark.parametrize(
    ("parameter_shapes", "shapes", "message"),
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
def test_the_error_says_why_a_weight_cannot_be_shared(
    parameter_shapes: dict, shapes: dict, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        plan_slices(parameter_shapes, [], EngineTensors(shapes, PACKED), identity)
    assert "share_weights: false" in str(caught.value)


def test_rewritten_tensors_are_refused_and_the_error_lists_five() -> None:
    parameter_shapes = {f"a{i}.weight": (2, 2) for i in range(8)}
    tensors = EngineTensors(dict(parameter_shapes), {}, rewritten_names=frozenset(parameter_shapes))
    with pytest.raises(UnsupportedError, match=r"has rewritten a0\.weight .*\(and 3 more\)"):
        plan_slices(parameter_shapes, [], tensors, identity)
