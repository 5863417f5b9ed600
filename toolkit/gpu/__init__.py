"""Values of this node and its GPUs, read through NVML and /proc. Read-only, no CUDA context."""
