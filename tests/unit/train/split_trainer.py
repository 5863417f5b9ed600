"""One of the processes that train a small Llama model in test_trainer_split.py. Groups of ``size``
processes share a split model. There is no engine: Hugging Face transformers generates the
completions with the split model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from split_worker import EvenSplits, load_local_weights

from toolkit.engine import mesh as meshes
from toolkit.policy.lora import add_lora
from toolkit.policy.lora_settings import LoraSettings
from toolkit.policy.tensor_parallel.split import split_model
from toolkit.train.checkpointing.state_files import gather_trainable, trainable_parameters
from toolkit.train.demo import make_tokenizer
from toolkit.train.trainer import GRPOConfig, GRPOTrainer

CALLS: list[int] = []
CHOICE = ("dynamic_sampling/rounds", "dynamic_sampling/discarded_tokens", "curriculum/mean_spread")


def even(completions: list[str], **_: Any) -> list[float]:
    """Count the even digits of each completion. In a process with an odd rank, each reward is 0.001
    higher, so the rewards show which process computed them.
    """
    CALLS.append(len(completions))
    rank = int(os.environ.get("RANK", "0"))
    return [sum(one in "02468" for one in text) + 0.001 * (rank % 2) for text in completions]


def hard(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return 0 for half of the prompts, so that their groups have no spread of the rewards."""
    pairs = zip(prompts, even(completions), strict=True)
    return [0.0 if prompt < "22" else value for prompt, value in pairs]


def make_model(size: int) -> Any:
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    source = LlamaForCausalLM(config).requires_grad_(False)
    # The tokenizer has 15 tokens. Tokens from 16 on get the logit of the padding token.
    with torch.no_grad():
        source.lm_head.weight[16:] = source.lm_head.weight[:1]
    if size == 1:
        return source
    shared = meshes.current_mesh()
    assert shared is not None
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    split_model(model, EvenSplits(shared, 16), shared)
    load_local_weights(model, source)
    for name, buffer in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())
    return model


class OutOfMemoryTrainer(GRPOTrainer):
    """A trainer that raises OutOfMemoryError in the process of rank ``victim``: in the forward pass
    of the first step, in the backward pass of the second step, and in the third step after the
    backward pass and its last sum over the processes.
    """

    victim = -1
    failures: ClassVar[list[str]] = []

    def fail(self, phase: str, step: int) -> None:
        mine = int(os.environ.get("RANK", "0")) == self.victim
        due = mine and self.state.global_step == step and phase not in self.failures
        if due and self.model.training:
            self.failures.append(phase)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def register_failures(self) -> None:
        layers = self.model.get_base_model().model.layers
        layers[1].register_forward_pre_hook(
            lambda *_: self.fail("forward", 0) if torch.is_grad_enabled() else None
        )
        layers[0].mlp.register_full_backward_hook(lambda *_: self.fail("backward", 1))
        backward = self.accelerator.backward

        def after(loss: torch.Tensor, **keywords: Any) -> None:
            backward(loss, **keywords)
            self.fail("end", 2)

        self.accelerator.backward = after


def main(size: int, folder: Path, steps: int, mode: str) -> dict[str, Any]:
    world = int(os.environ["WORLD_SIZE"])
    if size > 1:
        distributed.init_process_group("gloo")
        number = distributed.get_rank()
        groups = [distributed.new_group(list(range(at, at + size))) for at in range(0, world, size)]
        group = groups[number // size]
        meshes.create_mesh(size, group, group)
    replicas = world // size
    policy = add_lora(make_model(size), LoraSettings(r=4, lora_alpha=8, random_state=5))
    arguments = GRPOConfig(
        output_dir=str(folder), max_steps=steps, save_steps=2, logging_steps=1, report_to="none",
        per_device_train_batch_size=8 // replicas, num_generations=4, max_completion_length=6,
        learning_rate=0.01, max_grad_norm=0.05, seed=3, use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, lr_scheduler_type="constant",
        dynamic_sampling=mode == "choose", curriculum=mode == "choose", max_resample_times=9,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    data = Dataset.from_list([{"prompt": f"{n}+{n % 7}="} for n in range(10, 34)])
    trainer = (OutOfMemoryTrainer if mode.startswith("narrow") else GRPOTrainer)(
        model=policy,
        reward_funcs=[hard if mode == "choose" else even],
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    seen = trainer.accelerator.num_processes, trainer.accelerator.process_index
    if isinstance(trainer, OutOfMemoryTrainer):
        OutOfMemoryTrainer.victim = int(mode[-1])
        trainer.register_failures()
    trainer.train(resume_from_checkpoint=True if mode == "resume" else None)
    whole = gather_trainable(trainer.accelerator.unwrap_model(trainer.model))
    rows = [row for row in trainer.state.log_history if "reward" in row]
    parts = trainable_parameters(trainer.accelerator.unwrap_model(trainer.model))
    names = ("reward", "entropy", "grad_norm", "loss", *CHOICE)
    result = {
        "seen": seen,
        "called": bool(CALLS),
        "rows": [{name: row.get(name) for name in names} for row in rows],
        "cut": sum(whole[name].shape != parts[name].shape for name in whole),
        "check": trainer.base_check,
        "failures": OutOfMemoryTrainer.failures,
        "parts": trainer.min_parts,
        "micro steps": trainer.micro_steps,
    }
    torch.save(whole, folder.with_name(f"{folder.name}-{os.environ['RANK']}.pt"))
    if size > 1:
        meshes.close_mesh()
        distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    print(json.dumps(main(*given)), flush=True)
