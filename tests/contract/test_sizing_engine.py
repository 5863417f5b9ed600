"""The sizer's bytes of KV cache, weights, rotary tables and LoRA buffers are those of vLLM on a
CPU, for every architecture.

vLLM builds the model without loading weights or starting an engine. The test compares the sizer's
results with the size of the KV cache that vLLM computes, with the parameters of the model, and with
the buffers that vLLM's LoRA manager allocates.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.config.lora_targets import SLOT_LAYERS
from toolkit.sizing import kv_bytes, lora_bytes
from toolkit.sizing.spec import spec_from_values
from toolkit.sizing.weight_bytes import weight_bytes

pytestmark = [pytest.mark.contract, pytest.mark.engine]
TINY = json.loads((Path(__file__).parents[1] / "fixtures" / "sizing" / "tiny.json").read_text())
COMMON = TINY.pop("common")
LENGTH = 128
ELEMENT_BYTES = 4  # float32
RANKS = (8, 64, 256)


@pytest.fixture(scope="module")
def process_groups(tmp_path_factory):
    """vLLM's process groups for one process, created once."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    pytest.importorskip("vllm")
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    torch.set_num_threads(1)
    if torch.distributed.is_initialized():
        cleanup_dist_env_and_memory()  # groups that another test file left
    store = tmp_path_factory.mktemp("groups") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    yield initialize_model_parallel
    cleanup_dist_env_and_memory()


def _config_values(name):
    return {**COMMON, **TINY[name]}


@pytest.fixture
def tiny_model(process_groups, request, tmp_path):
    """The name of a tiny model, vLLM's config for it, and a function that builds the model."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    (tmp_path / "config.json").write_text(json.dumps(_config_values(request.param)))
    config = EngineArgs(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        max_model_len=LENGTH,
        max_num_batched_tokens=LENGTH,
        max_num_seqs=4,
    ).create_engine_config()

    def build():
        config.compilation_config.static_forward_context.clear()
        with set_default_torch_dtype(torch.float32):
            return initialize_model(config)

    with set_current_vllm_config(config):
        process_groups(1, 1)
        yield request.param, config, build
    destroy_model_parallel()


ALL_MODELS = pytest.mark.parametrize("tiny_model", sorted(TINY), indirect=True)


@ALL_MODELS
def test_kv_cache_bytes_are_those_of_the_engine(tiny_model):
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.core import kv_cache_utils

    name, config, build = tiny_model
    build()
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    specs = [layer.get_kv_cache_spec(config) for layer in layers.values()]
    attention_specs = [spec for spec in specs if type(spec).__name__ != "MambaSpec"]
    spec = spec_from_values(_config_values(name), name=name)
    bytes_per_token = sum(
        layer_spec.page_size_bytes / layer_spec.block_size for layer_spec in attention_specs
    )
    assert kv_bytes.bytes_per_token(spec, ELEMENT_BYTES) == bytes_per_token
    (block_tokens,) = {layer_spec.block_size for layer_spec in attention_specs}
    if len(attention_specs) == len(specs):
        specs_by_layer = {
            layer: layer_spec.get_kv_cache_spec(config) for layer, layer_spec in layers.items()
        }
        cache_groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs_by_layer)
        sequence = kv_cache_utils._max_memory_usage_bytes_from_groups(config, cache_groups)
    else:  # states and pages have different sizes until an engine aligns them
        sequence = sum(layer_spec.max_memory_usage_bytes(config) for layer_spec in specs)
    computed = kv_bytes.sequence_bytes(
        spec, LENGTH, ELEMENT_BYTES, block_tokens=block_tokens, batched_tokens=LENGTH
    )
    assert computed == sequence


@ALL_MODELS
def test_weight_and_rotary_table_bytes_are_those_of_the_engine(tiny_model):
    name, _, build = tiny_model
    model = build()
    spec = spec_from_values(_config_values(name), name=name)
    # DeepSeek's correction bias (one number for each expert) is a buffer in transformers.
    parameters = [
        parameter
        for key, parameter in model.named_parameters()
        if not key.endswith("correction_bias")
    ]
    assert weight_bytes(spec, "float32", None, engine=True) == sum(
        parameter.nbytes for parameter in parameters
    )
    tables = {
        table.untyped_storage().data_ptr(): table.untyped_storage().nbytes()
        for module in model.modules()
        for key, table in module.named_buffers(recurse=False)
        if key.endswith("cos_sin_cache")
    }
    # The Transformers backend computes the tables in each pass.
    if type(model).__name__.startswith("Transformers"):
        assert not tables
    else:
        assert sum(table.nbytes(ELEMENT_BYTES) for table in spec.rope_tables) == sum(
            tables.values()
        )


@ALL_MODELS
def test_lora_buffers_are_those_of_the_engine(tiny_model, monkeypatch):
    import vllm.lora.model_manager as manager

    name, _, _ = tiny_model
    spec = spec_from_values(_config_values(name), name=name)
    # vLLM creates slots on routed experts only with a CUDA kernel. The test of expert buffers
    # compares their allocation.
    is_supported = manager.is_supported_lora_module
    monkeypatch.setattr(
        manager,
        "is_supported_lora_module",
        lambda module_name, module, modules: (
            is_supported(module_name, module, modules) and not isinstance(module, manager.MoERunner)
        ),
    )
    without_experts = replace(
        spec,
        blocks=tuple(
            replace(block, linears=tuple(linear for linear in block.linears if linear.copies == 1))
            for block in spec.blocks
        ),
    )
    for rank in RANKS:
        assert lora_bytes.engine_lora_elements(
            without_experts, rank, 1
        ) * ELEMENT_BYTES == _lora_buffer_bytes(tiny_model, rank, None)


@ALL_MODELS
def test_slots_on_the_projections_are_those_of_the_engine(tiny_model):
    """The toolkit requests no slots for experts, embeddings and lm_head."""
    name, _, _ = tiny_model
    spec = spec_from_values(_config_values(name), name=name)
    for rank in RANKS:
        allocated = _lora_buffer_bytes(tiny_model, rank, SLOT_LAYERS)
        assert (
            lora_bytes.engine_lora_elements(spec, rank, 1, SLOT_LAYERS) * ELEMENT_BYTES == allocated
        )


@pytest.mark.parametrize("tiny_model", ["deepseek_v3"], indirect=True)
@pytest.mark.parametrize("target", ["kv_a_proj_with_mqa", "q_a_proj", "kv_b_proj"])
def test_slots_of_latent_attention_are_those_of_the_engine(tiny_model, target):
    """One name of a fused layer gives slots to the whole fused layer."""
    name, _, _ = tiny_model
    spec = spec_from_values(_config_values(name), name=name)
    assert lora_bytes.engine_lora_elements(
        spec, 8, 1, [target]
    ) * ELEMENT_BYTES == _lora_buffer_bytes(tiny_model, 8, [target])


def _lora_buffer_bytes(tiny_model, rank, modules):
    """Bytes that vLLM's LoRA manager allocates at ``rank`` for the layers of these names."""
    import torch
    import vllm.lora.model_manager as manager

    _, config, build = tiny_model
    config.lora_config.max_lora_rank = rank
    config.lora_config.target_modules = None if modules is None else list(modules)
    model = build()
    vocabulary = config.model_config.get_vocab_size()
    manager.create_lora_manager(
        model, 4, LENGTH, vocabulary, config.lora_config, config, torch.device("cpu")
    )
    return _allocated_lora_bytes(model)


def _allocated_lora_bytes(model):
    """Bytes of every LoRA buffer in ``model``, each storage once."""
    import torch

    storages = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if "lora_" not in name or "stacked" not in name:
                continue
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


MODELS_WITH_EXPERTS = [
    name
    for name in sorted(TINY)
    if any(
        linear.copies > 1
        for block in spec_from_values(_config_values(name), name=name).blocks
        for linear in block.linears
    )
]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", MODELS_WITH_EXPERTS)
def test_expert_buffers_are_those_of_the_engine(process_groups, name, rank):
    """The two methods of FusedMoEWithLoRA (or of its 3D form) that allocate buffers, called with
    the sizes of the model.
    """
    from types import SimpleNamespace

    import torch
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

    spec = spec_from_values(_config_values(name), name=name)
    for block in spec.blocks:
        experts = [linear for linear in block.linears if linear.copies > 1]
        if not experts:
            continue
        down = next(linear for linear in experts if linear.leaf == "down_proj")
        fused = not any(linear.leaf == "gate_proj" for linear in experts)
        layer = SimpleNamespace(
            _w13_slices=1 if fused else 2,
            _w13_a_num_experts=down.copies,
            _w2_b_num_experts=down.copies,
            local_num_experts=down.copies,
            hidden_size=down.out_features,
            fully_sharded=False,
            tp_size=1,
            device=torch.device("cpu"),
        )
        sizes = SimpleNamespace(intermediate_size_per_partition=down.in_features)
        layer.base_layer = layer.moe_config = layer.routed_experts = sizes
        layer.intermediate_size_per_partition = down.in_features
        config = SimpleNamespace(
            max_lora_rank=rank, max_loras=1, lora_dtype=torch.float32, fully_sharded_loras=False
        )
        FusedMoEWithLoRA._create_lora_a_weights(layer, 1, config)
        (FusedMoE3DWithLoRA if fused else FusedMoEWithLoRA)._create_lora_b_weights(layer, 1, config)
        allocated = sum(
            tensor.numel() * ELEMENT_BYTES
            for key, value in vars(layer).items()
            if "stacked" in key
            for tensor in value
        )
        expected = sum(
            linear.copies * rank * (linear.in_features + linear.out_features) * ELEMENT_BYTES
            for linear in experts
        )
        assert allocated == expected
