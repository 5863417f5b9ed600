"""Terms of a sizing computed by hand: quantized weights, adapters, optimizer states and CUDA
graphs. Also the calibration with measured values.
"""

import json

import pytest

from toolkit.base.errors import InputError
from toolkit.config.engine_settings import graph_sizes
from toolkit.config.run_config import SEVEN_PROJECTIONS
from toolkit.sizing import lora_bytes, solve
from toolkit.sizing.calibrate import calibrate, compare
from toolkit.sizing.engine_bytes import GRAPH_LAYER_BYTES
from toolkit.sizing.fit import available_host_bytes
from toolkit.sizing.model_blocks import Linear
from toolkit.sizing.weight_bytes import padded_vocab, weight_bytes
from toolkit.sizing.weight_formats import NF4_ON_LOAD, Quantization, parse_quantization
from toolkit.sizing.workload import optimizer_bytes

EIGHT_B, ONE_B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B-Instruct"


@pytest.mark.parametrize(
    ("scheme", "nbytes"),
    [
        (Quantization(method="bnb-nf4"), 4096 * 4096 // 2 + 4096 * 4096 // 64 * 4),
        (
            Quantization(method="bnb-nf4", nested=True),
            4096 * 4096 // 2 + 262144 + 1024 * 4 + 256 * 4 + 16 * 4,
        ),
        (Quantization(method="fp8", bits=8, group_size=0), 4096 * 4096 + 4 * 4096),
        (Quantization(method="fp8", bits=8, block_shape=(128, 128)), 4096 * 4096 + 4 * 32 * 32),
        (Quantization(method="mxfp4"), 4096 * 4096 // 2 + 4096 * 4096 // 32),
        (Quantization(method="bnb-int8", bits=8), 4096 * 4096 + 4 * 4096),
        (
            Quantization(method="awq", group_size=128),
            4096 * 512 * 4 + 32 * 512 * 4 + 32 * 4096 * 2,
        ),
        (
            Quantization(method="gptq", group_size=128),
            512 * 4096 * 4 + 32 * 512 * 4 + 32 * 4096 * 2 + 4096 * 4,
        ),
    ],
    ids=lambda value: value.method if isinstance(value, Quantization) else "",
)
def test_bytes_of_a_quantized_matrix(scheme, nbytes):
    assert scheme.weight_bytes(4096, 4096) == nbytes


def test_embeddings_and_head_stay_in_16_bits(spec_of):
    """With NF4 on load, embeddings and LM head have 16 bits. The layers have 0.5 bytes per weight
    and 4 bytes per 64 weights.
    """
    spec = spec_of(EIGHT_B)
    tables = 2 * 128256 * 4096 * 2
    layers = 8030261248 - 2 * 128256 * 4096
    expected = tables + layers * (0.5 + 4 / 64)
    assert weight_bytes(spec, "bfloat16", NF4_ON_LOAD) == pytest.approx(expected, rel=1e-3)


def test_latent_attention_unpacks_a_quantized_kv_b_proj(spec_of):
    """For DeepSeek V3 in FP8 the engine needs 61 layers x 512 x 128 heads x (128 + 128) values in
    16 bits in addition.
    """
    spec = spec_of("deepseek-ai/DeepSeek-V3")
    added_bytes = weight_bytes(spec, "bfloat16", spec.quantization, engine=True) - weight_bytes(
        spec, "bfloat16", spec.quantization
    )
    assert added_bytes == 61 * 512 * 128 * 256 * 2
    unquantized = weight_bytes(spec, "bfloat16", None, engine=True)
    # The engine uses views and makes no copy.
    assert unquantized == weight_bytes(spec, "bfloat16", None)


def test_the_engine_pads_the_vocabulary(spec_of):
    spec = spec_of("ibm-granite/granite-3.3-8b-instruct")
    assert padded_vocab(49159) == 49216
    added_bytes = weight_bytes(spec, "bfloat16", None, engine=True) - weight_bytes(
        spec, "bfloat16", None
    )
    assert added_bytes == (49216 - 49159) * 4096 * 2


def test_skipped_modules_are_not_quantized():
    scheme = parse_quantization(
        {
            "quant_method": "bitsandbytes",
            "llm_int8_skip_modules": ["mlp", "model.layers.*.self_attn"],
        },
        "config.json",
    )
    assert scheme.skips("mlp.down_proj")
    assert scheme.skips("self_attn.q_proj")
    assert not scheme.skips("linear_attn.out_proj")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), r".*\.(q_proj|v_proj)"])
def test_adapter_parameters(spec_of, targets):
    """A module has r x (in + out) parameters. There are 16 layers; q_proj is 2048 x 2048, v_proj is
    2048 x 512.
    """
    found = lora_bytes.adapter_parameters(spec_of(ONE_B), 8, targets)
    assert found == 16 * 8 * ((2048 + 2048) + (2048 + 512))


def test_stacked_experts_are_not_targeted():
    assert not lora_bytes.is_targeted(
        Linear("mlp.experts.up_proj", 4, 4, copies=8), SEVEN_PROJECTIONS
    )
    assert lora_bytes.is_targeted(Linear("mlp.up_proj", 4, 4), SEVEN_PROJECTIONS)
    assert lora_bytes.is_targeted(Linear("mlp.up_proj", 4, 4), "all-linear")


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("adamw_torch_fused", 8), ("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2.1),
        ("paged_adamw_8bit", 2.1), ("ademamix_8bit", 2.1), ("lion_32bit", 4), ("unheard_of", 8),
    ],
)  # fmt: skip
def test_optimizer_states(name, nbytes):
    assert optimizer_bytes(name) == nbytes


def test_an_adapter_is_float32_on_a_quantized_base_too(spec_of, card, run):
    sizes = {}
    for four_bit in (False, True):
        result = solve(run(load_in_4bit=four_bit), spec_of(EIGHT_B), card("h100"))
        sizes[four_bit] = {line.name: line.nbytes for line in result.terms}
    for name in ("trainer.adapter", "trainer.optimizer"):
        assert sizes[False][name] == sizes[True][name]
    # Autocast keeps a bfloat16 copy of the adapter during a step.
    assert sizes[True]["trainer.adapter_copies"] == sizes[True]["trainer.adapter"] // 2
    assert sizes[True]["trainer.dequantized"] == 14336 * 4096 * 2


def test_graphs_are_those_that_the_engine_captures(spec_of, card, run):
    few_sequences, many_sequences = (
        solve(run(max_num_seqs=sequences), spec_of(ONE_B), card("h100")) for sequences in (64, 1024)
    )
    counts = [len(graph_sizes(sequences, 8192)) for sequences in (64, 1024)]
    # With LoRA, each size is captured with an adapter and without one.
    added = 2 * (counts[1] - counts[0]) * few_sequences.model.layers * GRAPH_LAYER_BYTES
    assert many_sequences.engine.graph_bytes - few_sequences.engine.graph_bytes == added


def test_the_reference_of_the_kl_term_is_a_copy_of_the_adapter(spec_of, card, run):
    without_kl, with_kl = (
        {line.name: line.nbytes for line in solve(config, spec_of(EIGHT_B), card("h100")).terms}
        for config in (run(), run(grpo={"beta": 0.04}))
    )
    assert "trainer.reference" not in without_kl
    assert (
        with_kl["trainer.reference"] == with_kl["trainer.adapter"] == without_kl["trainer.adapter"]
    )


def test_eager_has_no_graphs(spec_of, card, run):
    result = solve(run(enforce_eager=True), spec_of(ONE_B), card("h100"))
    assert result.engine.graph_bytes == 0


def test_available_host_memory_is_positive():
    assert available_host_bytes() > 1 << 20


@pytest.fixture
def run_dir(tmp_path, spec_of, card, run):
    sizing = solve(run(), spec_of(ONE_B), card("h100")).to_json()
    (tmp_path / "preflight.json").write_text(json.dumps({"sizing": sizing}))
    return tmp_path, sizing


def test_calibrate_reads_the_run(run_dir):
    folder, sizing = run_dir
    peak = sizing["peaks"]["torch_bytes"]
    rows = [{"step": 1, "peak_memory_bytes": peak // 2}, {"step": 2, "peak_memory_bytes": peak}]
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"step": 3, "peak'
    (folder / "timings.jsonl").write_text(text)
    calibration = calibrate(folder)
    row = next(row for row in calibration.rows if row.term == "peak.torch")
    assert (row.predicted, row.measured, row.relative_error) == (peak, peak, 0.0)
    assert calibration.has_measurements
    assert not calibration.is_above_bound


def test_calibrate_compares_the_memory_of_the_engine(run_dir):
    folder, sizing = run_dir
    budget = {line["term"]: line["bytes"] for line in sizing["budget"]}
    loaded = sum(budget[f"engine.{name}"] for name in ("weights", "lora", "rope_tables"))
    (folder / "memory.json").write_text(json.dumps({"engine.loaded": loaded * 2}))
    row = next(row for row in calibrate(folder).rows if row.term == "engine.loaded")
    assert row.predicted == loaded
    assert row.relative_error == -0.5


def test_calibrate_sees_a_peak_above_the_bound(run_dir):
    _, sizing = run_dir
    bound = sizing["peaks"]["bound_bytes"]
    assert compare(sizing, {"peak.torch": bound + 1}).is_above_bound
    assert not compare(sizing, {"peak.torch": bound}).is_above_bound


def test_a_cpu_run_is_not_measured(run_dir):
    folder, sizing = run_dir
    (folder / "preflight.json").write_text(json.dumps({"sizing": {**sizing, "device": None}}))
    (folder / "timings.jsonl").write_text(json.dumps({"peak_memory_bytes": 10**9}))
    assert not calibrate(folder).has_measurements


@pytest.mark.parametrize("text", ["{}", "[]", '{"sizing": {"budget": [], "peaks": {}}}', "{"])
def test_calibrate_without_a_prediction(tmp_path, text):
    with pytest.raises(InputError, match="not a run folder"):
        calibrate(tmp_path)
    (tmp_path / "preflight.json").write_text(text)
    with pytest.raises(InputError):
        calibrate(tmp_path)


@pytest.mark.parametrize(("chunked", "tokens"), [(True, 8192), (False, 20000)])
def test_without_chunked_prefill_a_whole_prompt_is_batched(spec_of, card, run, chunked, tokens):
    config = run(max_seq_length=20000, enable_chunked_prefill=chunked)
    filled = solve(config, spec_of(ONE_B), card("h100")).apply(config)
    assert filled.model.max_num_batched_tokens == tokens
