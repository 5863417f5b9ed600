"""Packs give the same log-probabilities, entropies, losses and adapter gradients as TRL's padded
pass. Every model family of tests/engine is tested with one batch that has all difficult cases.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from trainer_helpers import arguments, ones

from toolkit.policy.lora import add_lora
from toolkit.policy.lora_settings import LoraSettings
from toolkit.train.trainer import GRPOTrainer

HERE = Path(__file__)
SPEC = importlib.util.spec_from_file_location(
    "families", HERE.parents[2] / "engine" / "engine_checkpoints.py"
)
assert SPEC is not None
assert SPEC.loader is not None
families = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)

FAST = ("llama",)
TARGETS = {"phi3": ("qkv_proj", "down_proj"), "qwen3_moe": ("q_proj", "v_proj")}
EAGER = {"gemma2": "eager"}
# Two groups of four rows with prompts of different lengths. One completion is empty, and two
# completions have one token.
PROMPTS = (7, 7, 7, 7, 3, 3, 3, 3)
LENGTHS = (9, 1, 0, 12, 4, 12, 1, 6)
WIDTH = max(LENGTHS)
SPLITS = {"one pack": 10_000, "groups": 28, "parts of groups": 16}
LOSSES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "a reference": {"beta": 0.1},
    "a second iteration": {"old": True},
    "a second iteration with a reference": {"old": True, "beta": 0.04, "loss_type": "grpo"},
    "tools": {"tools": True},
    "tools, a reference, a second iteration": {"tools": True, "old": True, "beta": 0.1},
}


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in families.FAMILIES
])  # fmt: skip
def trainer(request, tmp_path_factory):
    family = request.param
    folder = families.make_checkpoint(tmp_path_factory.mktemp(family), family)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=EAGER.get(family)
    )
    targets = TARGETS.get(family, ("q_proj", "v_proj", "down_proj"))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "random_state": 5}
    model = add_lora(model, LoraSettings(**settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    made = GRPOTrainer(
        model=model,
        reward_funcs=ones,
        args=arguments(
            folder,
            max_completion_length=WIDTH,
            # A router loss needs whole micro-batches, which are then not packed.
            router_aux_loss_coef=0.0 if "moe" in family else None,
        ),
        train_dataset=Dataset.from_list([{"prompt": "t4 t5"}] * 8),
        processing_class=families.make_tokenizer(),
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def make_batch(*, old=False, tools=False, beta=0.0, dead=True):
    """Return the inputs of TRL's loss: prompts padded on the left, completions on the right."""
    draw = torch.Generator().manual_seed(11)
    rows, longest = len(PROMPTS), max(PROMPTS)
    prompt_ids = torch.zeros(rows, longest, dtype=torch.long)
    prompt_mask = torch.zeros_like(prompt_ids)
    groups = [torch.randint(3, 200, (size,), generator=draw) for size in (PROMPTS[0], PROMPTS[-1])]
    ids = torch.randint(3, 200, (rows, WIDTH), generator=draw)
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    for row, size in enumerate(PROMPTS):
        prompt_ids[row, longest - size :] = groups[row // 4]
        prompt_mask[row, longest - size :] = 1
    advantages = torch.randn(rows, generator=draw)
    if dead:
        advantages[[1, 5]] = 0
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids * mask,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    noise = torch.randn(2, rows, WIDTH, generator=draw) * 0.1 - 5.4
    if old:
        inputs["old_per_token_logps"] = noise[0]
    if beta:
        inputs["ref_per_token_logps"] = noise[1]
    if tools:  # a tool wrote two tokens
        inputs["tool_mask"] = mask.clone()
        inputs["tool_mask"][0, 2:4] = 0
        inputs["num_items_in_batch"] = inputs["tool_mask"].sum()
    return inputs


def score(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, WIDTH, compute_entropy=True
        )
    real = inputs["completion_mask"].bool()
    return logps[real], entropy[real]


def compute_gradient(trainer, inputs):
    """Return the loss and the gradient of the adapter for one micro-batch. The trainer splits the
    micro-batch into packs.
    """
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    trainer.accelerator.backward(loss)
    found = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(found)


@pytest.fixture
def loss_case(trainer, request):
    """The trainer with the options of one loss, and the arguments for ``make_batch``. The options
    are restored after the test.
    """
    options = dict(request.param)
    made = {name: options.pop(name) for name in ("old", "tools") if name in options}
    made["beta"] = options.get("beta", 0.0)
    before = {name: getattr(trainer, name) for name in options}
    vars(trainer).update(options)
    yield trainer, made
    vars(trainer).update(before)
    trainer.padding_free, trainer.pack_tokens = True, None


def test_packed_scores_equal_padded_scores(trainer):
    inputs = make_batch()
    packed = score(trainer, inputs)
    assert trainer._reason_against_packs(trainer.model) is None
    trainer.padding_free = False
    try:
        padded = score(trainer, inputs)
    finally:
        trainer.padding_free = True
    for mine, theirs in zip(packed, padded, strict=True):
        assert (mine - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("loss_case", LOSSES.values(), ids=list(LOSSES), indirect=True)
def test_every_split_gives_the_gradient_of_a_padded_batch(loss_case):
    trainer, made = loss_case
    inputs = make_batch(**made)
    trainer.padding_free = False
    loss, theirs = compute_gradient(trainer, inputs)
    assert theirs.norm() > 0
    trainer.padding_free, trainer.micro_rows = True, 8
    cuts = []
    for tokens in SPLITS.values():
        trainer.pack_tokens = tokens
        own_loss, mine = compute_gradient(trainer, inputs)
        cuts.append(trainer.part_count)
        # Two rows have the advantage 0. Without a reference, they are left out.
        left_out = 0 if made["beta"] else 2 / 8
        assert trainer._metrics["train"]["packing/skipped_rows"][-1] == left_out
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
        assert own_loss == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    assert cuts[0] == 1
    assert cuts[0] < cuts[1] < cuts[2]
