"""The model under training: Hugging Face modules over the tensors of the engine, and LoRA."""
