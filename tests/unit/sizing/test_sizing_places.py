"""Sizing on the CPU, without an engine and for several processes; and the results of solve."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from toolkit.base.errors import ConfigError
from toolkit.base.formatting import GIB
from toolkit.sizing import Device, read_spec, resolve, solve

ONE_B = "meta-llama/Llama-3.2-1B-Instruct"


def term_bytes(result, name):
    return next(line.nbytes for line in result.terms if line.name == name)


def test_a_cpu_run_has_no_gpu_memory_utilization(spec_of, run, monkeypatch):
    monkeypatch.setattr("toolkit.sizing.fit.available_host_bytes", lambda: 64 * GIB)
    config = run(r=16)
    result = solve(config, spec_of(ONE_B), None)
    assert result.interval.min is None
    assert result.interval.max is None
    assert result.choice.kv_cache_bytes >= result.engine.kv_sequence_bytes
    filled = result.apply(config)
    assert filled.model.gpu_memory_utilization == "auto"
    assert filled.model.dtype == "float32"
    assert filled.model.max_lora_rank == 16


def test_a_host_with_too_little_memory(spec_of, run, monkeypatch):
    monkeypatch.setattr("toolkit.sizing.fit.available_host_bytes", lambda: 2 * GIB)
    result = solve(run(), spec_of(ONE_B), None)
    assert not result.feasible
    assert "host memory" in result.interval.binding_max


def test_a_run_without_an_engine_has_no_engine_terms(spec_of, card, run):
    """With transformers' generate, the terms are a cache for all rollouts and the weights of the
    trainer. There are no LoRA slots.
    """
    result = solve(run(engine="transformers"), spec_of(ONE_B), card("h100"))
    names = {line.name for line in result.terms}
    assert {"rollout.kv", "trainer.weights"} <= names
    assert not any(name.startswith("engine.") for name in names)
    assert result.interval.min is None
    assert result.choice.fast_inference is False


def test_two_processes_add_the_gradient_buckets(spec_of, card, run):
    config = run({"gradient_accumulation_steps": 2}, checkpointing=True)
    one_process = solve(config, spec_of(ONE_B), card("h100"))
    two_processes = solve(config, spec_of(ONE_B), card("h100"), world_size=2)
    adapter = term_bytes(one_process, "trainer.adapter")
    assert (
        term_bytes(two_processes, "trainer.gradients")
        - term_bytes(one_process, "trainer.gradients")
        == adapter
    )


def test_resolve_reads_the_model_and_replaces_every_auto(tmp_path, all_shapes, card, run):
    import json

    (tmp_path / "config.json").write_text(json.dumps(all_shapes[ONE_B]["config"]))
    config = run(r=16, model_name=str(tmp_path))
    filled, result = resolve(config, card("h100"))
    assert filled.model.max_lora_rank == 16
    assert result.model.parameters == 1235814400
    assert read_spec(str(tmp_path)).parameters == 1235814400


def test_json_has_the_agreed_names(spec_of, card, run):
    document = solve(run(), spec_of(ONE_B), card("h100")).to_json()
    assert document["model"]["parameters"] == 1235814400
    assert document["model"]["weight_bytes"] == 1235814400 * 2
    assert document["model"]["kv_bytes_per_token"] == 32768
    assert document["engine"]["lora_bytes"] > 0
    assert document["interval"]["min"] < document["interval"]["max"]
    assert document["choice"]["gpu_memory_utilization"] == document["interval"]["max"]
    assert document["choice"]["max_lora_rank"] == 16
    assert {"term", "bytes", "source"} <= set(document["budget"][0])
    assert all(isinstance(line["bytes"], int) and line["bytes"] >= 0 for line in document["budget"])


def test_the_error_names_the_key_of_a_bad_number(spec_of, card, run):
    with pytest.raises(ConfigError, match="per_device_train_batch_size"):
        solve(run({"per_device_train_batch_size": 0}), spec_of(ONE_B), card("h100"))


def test_generation_batch_and_sequences(spec_of, card, run):
    config = run(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "num_generations": 8}
    )
    result = solve(config, spec_of(ONE_B), card("h100"))
    assert result.choice.max_num_seqs == 32
    assert result.choice.largest_micro_batch >= 4


def test_the_margin_of_an_unknown_model_narrows_the_interval(spec_of, card, run):
    spec = spec_of(ONE_B)
    spec_with_margin = replace(spec, margin=0.1)
    before = solve(run(), spec, card("h100"))
    after = solve(run(), spec_with_margin, card("h100"))
    assert after.interval.min > before.interval.min
    assert after.interval.max < before.interval.max


def test_padding_of_mxfp4_is_within_its_margin(spec_of):
    """Marlin pads the inner size to a multiple of 128 and the hidden size to a multiple of 256."""
    spec = spec_of("openai/gpt-oss-20b")
    assert 1 + spec.margin > (2944 * 3072) / (2880 * 2880)
    assert any("padded" in note for note in spec.notes)


def test_the_prediction_is_close_to_a_measured_run(spec_of, run):
    """One run measured 42.40 GiB: 1.236e9 parameters, r = 64, gpu_memory_utilization 0.3 of
    143771 MiB, and a micro-batch of 16 x 320 tokens.
    """
    card = Device(
        name="H200", total_bytes=143771 << 20, free_bytes=143000 << 20, compute_capability=(9, 0)
    )
    grpo = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 256,
        "max_prompt_length": 64,
    }
    config = run(grpo, r=64, gpu_memory_utilization=0.3, checkpointing=True, max_num_seqs=64)
    result = solve(config, spec_of(ONE_B), card)
    assert result.peaks.torch_bytes / GIB == pytest.approx(42.40, rel=0.05)
    assert result.peaks.bound_bytes / GIB > 42.40


def test_grpo_stays_read_only(spec_of, card, run):
    config = run()
    filled = solve(config, spec_of(ONE_B), card("h100")).apply(config)
    assert isinstance(filled.grpo, MappingProxyType)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), "bfloat16"), ((7, 5), "float16"), ((0, 0), "bfloat16")]
)
def test_dtype_by_capability(spec_of, card, run, capability, dtype):
    device = replace(card("h100"), compute_capability=capability)
    assert solve(run(), spec_of(ONE_B), device).choice.dtype == dtype


def test_a_slice_is_sized_by_its_own_memory(spec_of, run):
    """For a slice, NVML reports the memory of the slice. The memory of the card is eight times as
    large.
    """
    from toolkit.gpu.reading import succeeded
    from toolkit.gpu.snapshot import GpuSnapshot

    memory = {"total": 10 * GIB, "free": 9 * GIB, "used": GIB, "reserved": GIB // 8, "version": 2}
    mig_slice = GpuSnapshot(
        index=0, parent=0, name=succeeded("A100 1g.10gb"), memory=succeeded(memory),
        compute_capability=succeeded([8, 0]),
    )  # fmt: skip
    device = Device.from_snapshot(mig_slice)
    assert (device.total_bytes, device.free_bytes) == (10 * GIB, 9 * GIB)
    assert device.cuda_total_bytes == 10 * GIB - GIB // 8
    assert solve(run(), spec_of(ONE_B), device).interval.max < 0.9
    # Version 1 of the query does not report the memory that the driver reserves.
    del memory["reserved"]
    empty = Device.from_snapshot(replace(mig_slice, memory=succeeded({**memory, "free": 10 * GIB})))
    assert empty.free_bytes == empty.cuda_total_bytes < 10 * GIB


def test_a_note_says_that_the_adapter_is_on_no_layer(spec_of, card, run):
    result = solve(run(targets=("query_key_value",)), spec_of(ONE_B), card("h100"))
    assert result.model.trainable_parameters == 0
    assert any("names no layer" in note for note in result.model.notes)


def test_a_card_that_does_not_report_its_memory_is_refused():
    from toolkit.gpu.reading import unsupported
    from toolkit.gpu.snapshot import GpuSnapshot

    with pytest.raises(ConfigError, match="does not report"):
        Device.from_snapshot(GpuSnapshot(index=3, memory=unsupported("N/A")))
