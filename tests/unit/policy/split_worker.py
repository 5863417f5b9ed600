"""One of several processes that share a small Llama, without an engine: what each of them computes,
beside what one process does. Started by test_policy_tensor_parallel.py.
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


class EvenCuts:
    """What vLLM does: even parts, and whole KV heads of which two processes may hold the same."""

    def __init__(self, shared: Mesh, head_dim: int) -> None:
        self.shared, self.head_dim = shared, head_dim

    def layer_split(self, name: str, out_features: int) -> WeightSplit:
        size, rank = self.shared.size, self.shared.rank
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
        width = WIDTH // self.shared.size
        start = self.shared.rank * width
        return WeightSplit("rows", start, min(width, VOCAB - start), VOCAB), width


def fill(model: Any, source: Any) -> None:
    """Give ``model`` (split, on the meta device) its part of the weights of ``source``."""
    theirs = dict(source.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        owner, value = model.get_submodule(path), theirs[name].detach()
        cut = getattr(owner, "split", None)
        if cut is not None and not (cut.style == "columns" and value.dim() == 1):
            value = value.narrow(1 if cut.style == "columns" else 0, cut.start, cut.length)
        setattr(owner, leaf, torch.nn.Parameter(value.clone(), requires_grad=False))
        del parameter


def step(model: Any, tokens: torch.Tensor, scores: Any) -> None:
    """A forward and backward pass of a loss over log-probabilities and entropies."""
    hidden = model.get_base_model().model(tokens).last_hidden_state[:, :-1].reshape(-1, 64)
    logps, entropy = scores(hidden, tokens[:, 1:].reshape(-1))
    weights = torch.linspace(-1, 1, len(logps))
    ((logps * weights).sum() + 0.3 * (entropy * weights**2).sum()).backward()


def main(  # noqa: PLR0915 - one process after the other, in one place
    kv_heads: int, checkpointing: bool
) -> dict[str, Any]:
    distributed.init_process_group("gloo")
    size, rank = distributed.get_world_size(), distributed.get_rank()
    world = distributed.group.WORLD
    shared = Mesh(size, rank, 0, 1, world, world, world)
    meshes._open_mesh = shared
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
    split_model(model, EvenCuts(shared, 16), shared)
    fill(model, source)
    for name, buffer in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())
    model.eval()
    source.eval()
    tokens = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["logits"] = float((model(tokens).logits - source(tokens).logits).abs().max())

    settings = LoraSettings(r=4, lora_alpha=8, random_state=5)
    ours, theirs = add_lora(model, settings), add_lora(source, settings)
    mine, other = adapter_tensors(ours), adapter_tensors(theirs)
    found["same start"] = all(torch.equal(mine[name], other[name]) for name in other)
    drawn = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(len(k))) * 0.1
             for k, v in other.items()}  # fmt: skip
    set_adapter_tensors(ours, drawn)
    set_adapter_tensors(theirs, drawn)
    found["written"] = all(torch.equal(v, drawn[k]) for k, v in adapter_tensors(ours).items())
    if checkpointing:
        for one in (ours, theirs):
            one.gradient_checkpointing_enable({"use_reentrant": False})
            one.enable_input_require_grads()
            one.train()
    distribution = Distribution(temperature=0.7)
    head, whole_head = model.get_output_embeddings(), source.get_output_embeddings()
    optimizers = []
    for policy, scores in (
        (ours, lambda h, t: score_split_vocabulary(head.local_logits(h), t, 0.7, head)),
        (theirs, lambda h, t: score_tokens(whole_head(h), t, distribution, None)),
    ):
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        optimizers.append(optimizer)
        for number in range(4):
            optimizer.zero_grad()
            step(policy, tokens, scores)
            if number == 0:
                gradients = {
                    n: gather_full_tensor(p.grad, p).clone()
                    for n, p in policy.named_parameters()
                    if p.requires_grad
                }
                found.setdefault("gradients", []).append(gradients)
            if policy is ours:
                norm = clip_split_grad_norm(trained, 0.5)
            else:
                norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
            found.setdefault("norms", []).append(float(norm))
            optimizer.step()
    first, second = found.pop("gradients")
    found["gradient"] = max(float((first[n] - second[n]).abs().max()) for n in second)
    found["largest gradient"] = max(float(g.abs().max()) for g in second.values())
    mine, other = adapter_tensors(ours), adapter_tensors(theirs)
    found["adapter"] = max(float((mine[n] - other[n]).abs().max()) for n in other)
    norms = found.pop("norms")
    found["norm"] = max(abs(a - b) / b for a, b in zip(norms[:4], norms[4:], strict=True))
    found["cut"] = sum(shard_of(p) is not None for p in ours.parameters())

    state = optimizer_state(optimizers[0])
    expected = optimizers[1].state_dict()["state"]
    found["state"] = max(
        float((value[key].float() - expected[number][key].float()).abs().max())
        for number, value in state["state"].items()
        for key in value
    )
    before = optimizers[0].state_dict()["state"]
    load_optimizer(optimizers[0], state)
    after = optimizers[0].state_dict()["state"]
    found["state read back"] = all(
        torch.equal(after[number][name], value) and after[number][name].is_contiguous()
        for number, held in before.items()
        for name, value in held.items()
    )
    parameter = next(p for p in ours.parameters() if shard_of(p) is not None)
    found["parts"] = torch.equal(local_shard(gather_full_tensor(parameter), parameter), parameter)
    replicated = torch.cat([p.detach().flatten() for p in ours.parameters()
                            if p.requires_grad and shard_of(p) is None])  # fmt: skip
    found["replicas equal"] = all(
        torch.equal(replicated, one) for one in shared.all_gather(replicated)
    )
    distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    result = main(int(sys.argv[1]), sys.argv[2] == "checkpointing")
    print(json.dumps(result), flush=True)
