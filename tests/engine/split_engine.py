"""A worker process: one of several engines that share a model. Compares its samples and its
trainer's logits with a separate load of the model. Started by test_engine_tensor_parallel.py;
prints one JSON line per family.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import engine_checkpoints
import torch
from conftest import small_options
from transformers import AutoModelForCausalLM

from toolkit.engine.mesh import create_default_group
from toolkit.engine.open_engine import open_engine
from toolkit.engine.rollout_request import Sampling
from toolkit.policy.lora import adapter_tensors, add_lora, set_adapter_tensors
from toolkit.policy.lora_settings import LoraSettings
from toolkit.policy.shared_weights import shared_model


def largest_logprob_gap(
    engine: Any, policy: Any, prompt: list[int]
) -> tuple[float, list[list[int]]]:
    """The largest difference between the log-probabilities of engine and trainer over two
    completions, and the token ids of these completions.
    """
    rollout = engine.generate([prompt], Sampling(n=2, max_tokens=16, temperature=0.7), seed=3)
    gaps = []
    for ids, engine_logprobs in zip(rollout.completion_ids, rollout.logprobs, strict=True):
        sequence = torch.tensor([prompt + ids])
        with torch.no_grad():
            logits = policy(sequence).logits[0, len(prompt) - 1 : -1].float() / 0.7
        trainer_logprobs = torch.log_softmax(logits, -1).gather(
            1, sequence[0, len(prompt) :, None]
        )[:, 0]
        gaps.append(
            float(
                (trainer_logprobs - torch.tensor([position[0] for position in engine_logprobs]))
                .abs()
                .max()
            )
        )
    return max(gaps), rollout.completion_ids


def compare_with_separate_load(folder: Path, family: str) -> dict[str, Any]:
    eager = "eager" if family == "gemma2" else None
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=eager
    )
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    prompt = tokens[0].tolist()
    with torch.no_grad():
        expected = reference(tokens).logits
    size = int(os.environ["WORLD_SIZE"])
    with open_engine(
        small_options(folder, tensor_parallel_size=size, block_size=32, extra={})
    ) as engine:
        model = shared_model(engine)
        with torch.no_grad():
            logits = float((model(tokens).logits - expected).abs().max())
        storages = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
        all_shared = all(p.untyped_storage().data_ptr() in storages for p in model.parameters())
        policy = add_lora(model, LoraSettings(r=8, lora_alpha=16))
        random_tensors = {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
            * 0.05
            for name, value in adapter_tensors(policy).items()
        }
        gaps, ids, outputs = [], [], []
        for factor in (1.0, 1.5):  # first published by vLLM's manager, then written into the slots
            set_adapter_tensors(
                policy, {name: value * factor for name, value in random_tensors.items()}
            )
            engine.publish(policy)
            gap, completion_ids = largest_logprob_gap(engine, policy, prompt)
            gaps.append(gap)
            ids.append(completion_ids)
            with torch.no_grad():
                outputs.append(policy(tokens).logits)
    max_change = float((outputs[1] - outputs[0]).abs().max())
    return {
        "family": family, "logits": logits, "gaps": gaps, "ids": ids, "moved": max_change,
        "shared": all_shared,
    }  # fmt: skip


def main(folder: Path, families: list[str]) -> None:
    torch.set_num_threads(1)
    create_default_group()
    for family in families:
        if os.environ["RANK"] == "0":
            engine_checkpoints.make_checkpoint(folder / family, family)
        torch.distributed.barrier()
        print(json.dumps(compare_with_separate_load(folder / family, family)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
