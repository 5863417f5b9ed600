"""The run file of the demo's world."""

from __future__ import annotations

from toolkit.config.schemas import schema_path

RUN_FILE = """\
# yaml-language-server: $schema={schema}
# Written by `toolkit demo`. Train it again:  toolkit train {name} --evaluate
model:
  model_name: model
  max_seq_length: 16
  dtype: float32
lora:
  r: 32
  lora_alpha: 32
  use_gradient_checkpointing: false
  random_state: {seed}
dataset:
  path: train.jsonl
  eval_path: eval.jsonl
  prompt: question
  answer: answer
reward:
  functions:
    - name: exact_match
grpo:
  max_steps: 80
  per_device_train_batch_size: 256
  num_generations: 8
  max_prompt_length: 8
  max_completion_length: 4
  learning_rate: 0.003
  lr_scheduler_type: linear
  warmup_steps: 5
  save_steps: 40
  seed: {seed}
runtime:
  engine: {engine}
  output_dir: run
"""


def run_file_text(name: str, *, engine: str, seed: int) -> str:
    """What stands in the run file ``name``; editors find the schema by its first line."""
    schema = schema_path("run").resolve()
    return RUN_FILE.format(schema=schema, name=name, engine=engine, seed=seed)
