"""Build the model that is trained: Hugging Face modules, whose weights may be views of the vLLM
engine's tensors, and a LoRA adapter.
"""
