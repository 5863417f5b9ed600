"""A worker process: one of several that share a small Llama, without an engine. Compares the
results of the split model with those of a whole model. Started by test_policy_tensor_parallel.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit.engine import mesh as meshes
from toolkit.engine.mesh import Mesh
from toolkit.engine.shards import WeightSplit, gather_full_tensor, local_shard, shard_of
from toolkit.policy.lora import adapter_tensors, add_lora, set_adapter_tensors
from toolkit.policy.lora_settings import LoraSettings
from toolkit.policy.tensor_parallel.functions import clip_split_grad_norm
from toolkit.policy.tensor_parallel.split import split_model
from toolkit.train.checkpointing.state_files import load_optimizer, optimizer_state
from toolkit.train.step.kept_set import Distribution, score_tokens
from toolkit.train.step.sampled_head import score_split_vocabulary

VOCAB, WIDTH = 100, 128  # the vocabulary, padded to a multiple of 64


class EvenSplits:
    """Splits as vLLM does: into even parts and whole KV heads; two processes may hold the same
    head.
    """

    def __init__(self, mesh: Mesh, head_dim: int) -> None:
        self.mesh, self.head_dim = mesh, head_dim

    def layer_split(self, name: str, out_features: int) -> WeightSplit:
        size, rank = self.mesh.size, self.mesh.rank
        if name.endswith(("o_proj", "down_proj")):
            columns = {"o_proj": 64, "down_proj": 96}[name.rpartition(".")[2]]
            return WeightSplit("columns", rank * (columns // size), columns // size, columns)
        length = out_features // size
        if name.endswith(("k_proj", "v_proj")):
            length = max(length, self.head_dim)
        copies = length * size // out_features
        return WeightSplit(
            "rows", rank // copies * length, length, out_features, repeated=copies > 1
        )

    def vocabulary_split(self, name: str) -> tuple[WeightSplit, int]:
        width = WIDTH // self.mesh.size
        start = self.mesh.rank * width
        return WeightSplit("rows", start, min(width, VOCAB - start), VOCAB), width


def load_local_weights(model: Any, source: Any) -> None:
    """Give ``model`` (split, on the meta device) its part of the weights of ``source``."""
    source_parameters = dict(source.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        owner, value = model.get_submodule(path), source_parameters[name].detach()
        split = getattr(owner, "split", None)
        if split is not None and not (split.style == "columns" and value.dim() == 1):
            value = value.narrow(1 if split.style == "columns" else 0, split.start, split.length)
        setattr(owner, leaf, torch.nn.Parameter(value.clone(), requires_grad=False))
        del parameter


def forward_and_backward(model: Any, tokens: torch.Tensor, score_tokens_of: Any) -> None:
    """A forward and backward pass of a loss over log-probabilities and entropies."""
    hidden = model.get_base_model().model(tokens).last_hidden_state[:, :-1].reshape(-1, 64)
    logps, entropy = score_tokens_of(hidden, tokens[:, 1:].reshape(-1))
    weights = torch.linspace(-1, 1, len(logps))
    ((logps * weights).sum() + 0.3 * (entropy * weights**2).sum()).backward()


def main(  # noqa: PLR0915 - all comparisons in one function
    kv_heads: int, checkpointing: bool
) -> dict[str, Any]:
    distributed.init_process_group("gloo")
    size, rank = distributed.get_world_size(), distributed.get_rank()
    world = distributed.group.WORLD
    mesh = Mesh(size, rank, 0, 1, world, world, world)
    meshes._open_mesh = mesh
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, attention_bias=True,
        tie_word_embeddings=kv_heads == 1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    source = LlamaForCausalLM(config).requires_grad_(False)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    split_model(model, EvenSplits(mesh, 16), mesh)
    load_local_weights(model, source)
    for name, buffer in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())
    model.eval()
    source.eval()
    tokens = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    results: dict[str, Any] = {}
    with torch.no_grad():
        results["logits"] = float((model(tokens).logits - source(tokens).logits).abs().max())

    settings = LoraSettings(r=4, lora_alpha=8, random_state=5)
    split_policy, full_policy = add_lora(model, settings), add_lora(source, settings)
    split_tensors, full_tensors = adapter_tensors(split_policy), adapter_tensors(full_policy)
    results["same start"] = all(
        torch.equal(split_tensors[name], full_tensors[name]) for name in full_tensors
    )
    random_tensors = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(len(k))) * 0.1
             for k, v in full_tensors.items()}  # fmt: skip
    set_adapter_tensors(split_policy, random_tensors)
    set_adapter_tensors(full_policy, random_tensors)
    results["written"] = all(
        torch.equal(v, random_tensors[k]) for k, v in adapter_tensors(split_policy).items()
    )
    if checkpointing:
        for peft_model in (split_policy, full_policy):
            peft_model.gradient_checkpointing_enable({"use_reentrant": False})
            peft_model.enable_input_require_grads()
            peft_model.train()
    distribution = Distribution(temperature=0.7)
    head, full_head = model.get_output_embeddings(), source.get_output_embeddings()
    optimizers = []
    for policy, scores in (
        (split_policy, lambda h, t: score_split_vocabulary(head.local_logits(h), t, 0.7, head)),
        (full_policy, lambda h, t: score_tokens(full_head(h), t, distribution, None)),
    ):
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        optimizers.append(optimizer)
        for number in range(4):
            optimizer.zero_grad()
            forward_and_backward(policy, tokens, scores)
            if number == 0:
                gradients = {
                    n: gather_full_tensor(p.grad, p).clone()
                    for n, p in policy.named_parameters()
                    if p.requires_grad
                }
                results.setdefault("gradients", []).append(gradients)
            if policy is split_policy:
                norm = clip_split_grad_norm(trained, 0.5)
            else:
                norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
            results.setdefault("norms", []).append(float(norm))
            optimizer.step()
    first, second = results.pop("gradients")
    results["gradient"] = max(float((first[n] - second[n]).abs().max()) for n in second)
    results["largest gradient"] = max(float(g.abs().max()) for g in second.values())
    split_tensors, full_tensors = adapter_tensors(split_policy), adapter_tensors(full_policy)
    results["adapter"] = max(
        float((split_tensors[n] - full_tensors[n]).abs().max()) for n in full_tensors
    )
    norms = results.pop("norms")
    results["norm"] = max(abs(a - b) / b for a, b in zip(norms[:4], norms[4:], strict=True))
    results["cut"] = sum(shard_of(p) is not None for p in split_policy.parameters())

    state = optimizer_state(optimizers[0])
    expected = optimizers[1].state_dict()["state"]
    results["state"] = max(
        float((value[key].float() - expected[number][key].float()).abs().max())
        for number, value in state["state"].items()
        for key in value
    )
    before = optimizers[0].state_dict()["state"]
    load_optimizer(optimizers[0], state)
    after = optimizers[0].state_dict()["state"]
    results["state read back"] = all(
        torch.equal(after[number][name], value) and after[number][name].is_contiguous()
        for number, parameter_state in before.items()
        for name, value in parameter_state.items()
    )
    parameter = next(p for p in split_policy.parameters() if shard_of(p) is not None)
    results["parts"] = torch.equal(local_shard(gather_full_tensor(parameter), parameter), parameter)
    replicated = torch.cat([p.detach().flatten() for p in split_policy.parameters()
                            if p.requires_grad and shard_of(p) is None])  # fmt: skip
    results["replicas equal"] = all(
        torch.equal(replicated, one) for one in mesh.all_gather(replicated)
    )
    distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    result = main(int(sys.argv[1]), sys.argv[2] == "checkpointing")
    print(json.dumps(result), flush=True)
