"""Error texts about GPU memory."""

from __future__ import annotations

from toolkit.base.symptoms import numbers
from toolkit.base.symptoms.symptom import entry

ENTRIES = (
    entry(
        "no-cache-blocks",
        "The engine has no memory left for its KV cache",
        "size: interval.min",
        "raise gpu_memory_utilization above the value of interval.min in `envcheck size run.yaml "
        "--json`, or set it to auto",
        1,
        "No available memory for the cache blocks",
        "Available KV cache memory: -{n} GiB",
    ),
    entry(
        "free-below-request",
        "Less memory is free than gpu_memory_utilization requests",
        "memory.free",
        "wait for the process that uses the memory, or end it (`envcheck probe` names it), or "
        "lower gpu_memory_utilization to the value of interval.max in `envcheck size run.yaml "
        "--json`",
        4,
        "Free memory on device{..}is less than desired GPU memory utilization",
        add_details=numbers.largest_utilization,
    ),
    entry(
        "sequence-does-not-fit",
        "One sequence of max_seq_length does not fit in the KV cache",
        "size: interval.min",
        "lower max_seq_length, raise gpu_memory_utilization, or use float8_kv_cache; `envcheck "
        "size run.yaml` shows how much memory each change saves",
        1,
        "To serve at least one request with the model's max seq len",
        "To serve at least one request with the models's max seq len",  # releases up to 0.11
        "max seq len ({n}) is larger than the maximum number of tokens that can be stored in KV "
        "cache",
        add_details=numbers.longest_length,
    ),
    entry(
        "lora-rank",
        "The adapter's rank is above max_lora_rank, or max_lora_rank has a value that vLLM refuses",
        "LORA002, LORA003",
        "set max_lora_rank to auto, or to the next of 1, 8, 16, 32, 64, 128, 256, 320, 512 that is "
        "at least lora.r",
        1,
        "LoRA rank {n} is greater than max_lora_rank",
        "max_lora_rank{..}Input should be 1, 8, 16",
        "max_lora_rank{..}Input should be 1,8,16",
        "max_lora_rank ({n}) must be one of",
        add_details=numbers.lora_rank,
    ),
    entry(
        "lora-target",
        "vLLM does not support an adapter on this layer",
        "LORA004",
        "remove the layer that the error names from lora.target_modules and lora.modules_to_save; "
        "vLLM supports adapters on linear layers, but not on lm_head or embed_tokens",
        1,
        "is unsupported LoRA weight",
        "expected target modules in [{..}] but received [",
    ),
    entry(
        "sampler-warm-up",
        "The engine ran out of memory while warming up its sampler",
        "size: choice.max_num_seqs",
        "lower max_num_seqs, or set it to auto; the warm-up needs memory for max_num_seqs x "
        "vocabulary numbers",
        1,
        "when warming up sampler with {n} dummy requests",
        add_details=numbers.halve_sequences,
    ),
    entry(
        "graph-capture",
        "Memory ran out while capturing CUDA graphs",
        "size: CUDA graphs",
        "lower gpu_memory_utilization to the value of interval.max in `envcheck size run.yaml "
        "--json`, or set enforce_eager: true",
        1,
        "out of memory while capturing CUDA graphs",
        "Capturing CUDA graph{....}out of memory",
        "capture_model{....}out of memory",
        "_capture_cudagraphs{....}out of memory",
        "CUDA error: operation failed due to a previous error during capture",
    ),
    entry(
        "training-out-of-memory",
        "CUDA ran out of memory",
        "size: trainer peak at the longest completion",
        "lower gpu_memory_utilization, per_device_train_batch_size or max_completion_length, or "
        "turn gradient checkpointing on; `envcheck size run.yaml` shows how much memory each "
        "change saves. In the first seconds of a run, another process may use the memory: "
        "`envcheck probe` names it",
        1,
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "cudaErrorMemoryAllocation",
        "torch.OutOfMemoryError",
        "torch.cuda.OutOfMemoryError",
        add_details=numbers.out_of_memory,
        unless=("sampler-warm-up", "graph-capture"),
    ),
    entry(
        "cublas-allocation",
        "cuBLAS found no memory for its workspace: the card is full",
        "size: trainer peak at the longest completion",
        "lower gpu_memory_utilization by 0.01 to 0.02, because cuBLAS allocates its handle and "
        "workspace (up to about 100 MiB) outside torch's pool",
        1,
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
        "CUDNN_STATUS_ALLOC_FAILED",
    ),
    entry(
        "neighbour-moved",
        "Another process freed or took GPU memory while the engine was measuring",
        "memory.tenant",
        "start again; if the error recurs, find the other process with `envcheck probe` and use "
        "the card exclusively",
        4,
        "Error in memory profiling. Initial free memory",
        "Error in memory profiling.Initial free memory",
        "Error in memory profiling Initial free memory",
    ),
    entry(
        "expandable-segments",
        "This vLLM release does not support expandable_segments together with its sleep mode",
        "software.pins",
        "install the vLLM of the lock files, which supports both together; or set "
        "PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF to expandable_segments:False, or turn KV "
        "sleep off",
        1,
        "Expandable segments are not compatible with memory pool",
    ),
    entry(
        "allocator-setting",
        "An allocator setting in the environment is not accepted or is out of date",
        "host.env",
        "unset PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF: `toolkit train` sets both as needed",
        1,
        "Unrecognized CachingAllocator option",
        "PYTORCH_CUDA_ALLOC_CONF is deprecated, use PYTORCH_ALLOC_CONF",
        "Unknown vLLM environment variable detected",
        "expandable_segments not supported on this platform",
    ),
    entry(
        "memory-not-told",
        "The driver does not report this card's memory (integrated memory, or a vGPU without "
        "permission)",
        "memory.readable",
        "name the card with the option --gpu: `envcheck size run.yaml --gpu CARD`. On a card with "
        "integrated memory, the sizer uses the available memory of the host",
        5,
        "nvmlDeviceGetMemoryInfo{..}Not Supported",
        "Memory-Usage : Not Supported",
        "NVMLError_NotSupported: Not Supported",
    ),
)
