"""The model under training: Hugging Face modules on the engine's tensors, and LoRA."""
