"""Build a small demo: a model, data, and a run file that trains in about a minute.

The model is a character-level Llama (a real checkpoint and tokenizer). Supervised training first
teaches it to add two-digit numbers. In a small part of the training answers, the carry is missing.
When the model can add, the training continues for some steps on answers in which most carries are
missing. After that, the model answers about half of the held-out problems correctly. For the other
problems, it sometimes samples the correct answer. GRPO then improves the model from the rewards
alone.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.base.errors import DefectError
from toolkit.base.paths import make_folder, write_file
from toolkit.config.schemas import schema_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

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
    """Return the text of the run file ``name``. Its first line contains the path of the JSON
    schema, which editors read.
    """
    schema = schema_path("run").resolve()
    return RUN_FILE.format(schema=schema, name=name, engine=engine, seed=seed)


Problem = tuple[int, int]

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHARACTERS = "0123456789+="
HELD_OUT_COUNT, VALIDATION_COUNT = 500, 250
FIRST_CARRY_DROP_RATE, LATER_CARRY_DROP_RATE = 0.2, 0.7
"""The probabilities that the training answer to a problem lacks the carry: before the model can
add, and after that. 45 of 100 problems have a carry.
"""
BATCH_SIZE, MAX_STEPS, VALIDATION_INTERVAL_STEPS = 128, 1500, 25
LEARNING_RATE, WARMUP_STEPS, FINAL_STEPS = 2e-3, 50, 100
SOLVED_SHARE = 0.88
"""The model can add if it answers this share of the problems correctly (see
``LATER_CARRY_DROP_RATE``).
"""


@dataclass(frozen=True, slots=True)
class Demo:
    """The path of the demo's run file, and how long it took to build the demo."""

    run_file: Path
    pretraining_s: float


def answer(problem: Problem) -> str:
    """Return the correct sum as text."""
    return str(sum(problem))


def answer_without_carry(problem: Problem) -> str:
    """Return the sum as text, without the carry from the last digits."""
    first, second = problem
    return str((first // 10 + second // 10) * 10 + (first + second) % 10)


def question(problem: Problem) -> str:
    """Return the prompt of a problem, for example ``12+34=``."""
    return f"{problem[0]}+{problem[1]}="


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        padding_side="left",
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a Llama with 0.46 M parameters, float32, randomly initialised."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            dtype="float32",
        )
    )


def build_demo(folder: Path, *, engine: str, seed: int, print_line: Callable[[str], None]) -> Demo:
    """Create model, tokenizer, data and run file in ``folder``.

    Raises:
        OSError: the folder cannot be written.
        DefectError: the model did not learn to add.
    """
    make_folder(folder)
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(problems)
    held_out, problems = hold_out(problems, HELD_OUT_COUNT)
    validation_problems, train_problems = hold_out(problems, VALIDATION_COUNT)
    tokenizer, model = make_tokenizer(), make_model(seed)
    begin = monotonic()
    train_to_add(
        model, tokenizer, train_problems, validation_problems, seed=seed, print_line=print_line
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # safetensors writes files that only their owner can read (mode 0600). A container runs as
    # another user, so the weights get the mode of config.json.
    mode = (folder / "model/config.json").stat().st_mode
    (folder / "model/model.safetensors").chmod(mode)
    for name, rows in (("train.jsonl", train_problems), ("eval.jsonl", held_out)):
        lines = [json.dumps({"question": question(p), "answer": answer(p)}) for p in rows]
        write_file(folder / name, "\n".join(lines) + "\n")
    run_file = folder / "run.yaml"
    write_file(run_file, run_file_text(run_file.name, engine=engine, seed=seed))
    return Demo(run_file, monotonic() - begin)


def hold_out(problems: Sequence[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """Split ``problems`` into (held out, the rest). ``count`` problems are held out: the first
    ``count // 2`` problems with a carry, and the first problems without a carry.
    """
    with_carry = [p for p in problems if answer(p) != answer_without_carry(p)][: count // 2]
    without_carry = [p for p in problems if answer(p) == answer_without_carry(p)][
        : count - len(with_carry)
    ]
    held_out = {*with_carry, *without_carry}
    held_out_in_order = [p for p in problems if p in held_out]
    return held_out_in_order, [p for p in problems if p not in held_out]


def encode(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], answers: Sequence[str]
) -> torch.Tensor:
    """Return the token ids of the problems, with shape (number of problems, 10). A row has six
    tokens of the question, up to three of the answer, the end-of-sequence token, and padding.
    """
    rows = []
    for problem, text in zip(problems, answers, strict=True):
        ids = tokenizer(question(problem) + text)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * (10 - len(ids)))
    return torch.tensor(rows)


def train_to_add(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train_problems: Sequence[Problem],
    validation_problems: Sequence[Problem],
    *,
    seed: int,
    print_line: Callable[[str], None],
) -> int:
    """Train ``model`` with supervised steps. At first it learns to add. In the last steps it learns
    to leave out the carry in most answers. Return the number of steps.

    Raises:
        DefectError: the model did not learn to add within ``MAX_STEPS`` steps.
    """
    correct_ids = encode(tokenizer, train_problems, [answer(p) for p in train_problems])
    carryless_ids = encode(
        tokenizer, train_problems, [answer_without_carry(p) for p in train_problems]
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    model.train()
    last_step = MAX_STEPS
    for step in range(1, MAX_STEPS + 1):
        lr_scale = min(1.0, step / WARMUP_STEPS, (last_step - step + 1) / FINAL_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * lr_scale
        chosen = torch.randint(len(train_problems), (BATCH_SIZE,), generator=generator)
        carry_drop_rate = FIRST_CARRY_DROP_RATE if last_step == MAX_STEPS else LATER_CARRY_DROP_RATE
        drop_carry = torch.rand(BATCH_SIZE, generator=generator) < carry_drop_rate
        ids = torch.where(drop_carry[:, None], carryless_ids[chosen], correct_ids[chosen])
        optimizer.zero_grad()
        loss = _loss(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]  # torch 2.13 leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % VALIDATION_INTERVAL_STEPS == 0:
            correct_share, near_correct_share = _measure_accuracy(
                model, tokenizer, validation_problems
            )
            if step % (4 * VALIDATION_INTERVAL_STEPS) == 0 or step >= last_step:
                print_line(
                    f"supervised step {step}: {correct_share:.2f} of the answers are correct, "
                    f"{near_correct_share:.2f} are correct or lack only the carry"
                )
            if step >= last_step:
                model.eval()
                return step
            if correct_share >= SOLVED_SHARE and last_step == MAX_STEPS:
                last_step = step + FINAL_STEPS
    raise DefectError(f"the demo's model did not learn to add in {MAX_STEPS} steps")


def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, 5:-1]
    targets = ids[:, 6:]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=0
    )


def _measure_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> tuple[float, float]:
    """Answer ``problems`` (additions) by greedy decoding. Return two shares of the answers: those
    that are the sum, and those that are the sum or the sum without the carry.
    """
    prompts = torch.tensor([tokenizer(question(p))["input_ids"] for p in problems])
    ids = prompts
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    answers = [_decode(row) for row in ids[:, 6:].tolist()]
    is_correct = [text == answer(p) for text, p in zip(answers, problems, strict=True)]
    is_near_correct = [
        correct or text == answer_without_carry(p)
        for correct, text, p in zip(is_correct, answers, problems, strict=True)
    ]
    return sum(is_correct) / len(is_correct), sum(is_near_correct) / len(is_near_correct)


def _decode(ids: list[int]) -> str:
    """Return the text of the tokens before the end-of-sequence token."""
    answer_ids = takewhile(lambda token: token >= len(SPECIAL_TOKENS), ids)
    return "".join(CHARACTERS[token - len(SPECIAL_TOKENS)] for token in answer_ids)
