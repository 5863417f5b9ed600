"""Build the model that is trained: Hugging Face modules on the engine's tensors, and LoRA."""
