"""Run vLLM in this process. Only this package imports vllm."""
