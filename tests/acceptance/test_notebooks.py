"""The call patterns of public GRPO notebooks, rewritten for a small model.

Each test follows one notebook from top to bottom and uses its arguments. The docstring of
``notebook_world`` lists the arguments that differ here, and why.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from notebook_world import (
    SHORT_RUN,
    SMALL_MODEL,
    SYSTEM,
    TARGETS,
    chats,
    correct,
    counted_tags,
    is_number,
    make_folder,
    questions,
    strict_format,
    trained_layers,
    varies,
)

from toolkit import FastLanguageModel, FastModel, GRPOConfig, GRPOTrainer
from toolkit.base.errors import ConfigValueError, ToolkitWarning, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("notebook") / "tiny")


@pytest.fixture(autouse=True)
def _cpu_without_warnings() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


def config(tmp_path: Path, **notebook: Any) -> GRPOConfig:
    values = {"report_to": "none", "output_dir": str(tmp_path / "outputs"), **notebook, **SHORT_RUN}
    return GRPOConfig(**values)


def test_gsm8k_with_llama(folder: Path, tmp_path: Path) -> None:
    """Llama 3.1 8B: five rewards, batch size 1, six generations, sampling with a saved adapter."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_lora_rank=32, gpu_memory_utilization=0.6, **SMALL_MODEL
    )
    model = FastLanguageModel.get_peft_model(
        model, r=32, target_modules=TARGETS, lora_alpha=32,
        use_gradient_checkpointing="unsloth", random_state=3407,
    )  # fmt: skip
    notebook: dict[str, Any] = {
        "learning_rate": 5e-6, "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.1,
        "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "logging_steps": 1,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_generations": 6,
        "save_steps": 250, "max_grad_norm": 0.1,
    }  # fmt: skip
    with pytest.raises(ConfigValueError, match="not a multiple of num_generations=6") as caught:
        config(tmp_path, **notebook)
    choice = re.search(r"(per_device_train_batch_size)=(\d+)", str(caught.value.fix))
    assert choice is not None
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[counted_tags, strict_format, is_number, correct, varies],
        args=config(tmp_path, **{**notebook, choice[1]: int(choice[2])}),
        train_dataset=chats(),
    )
    trainer.train()
    assert trained_layers(model)

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how many r"}], tokenize=False, add_generation_prompt=True
    )
    plain = model.fast_generate(
        [text], max_tokens=6, temperature=0.8, top_p=0.95, seed=1, lora_request=None
    )
    model.save_lora(str(tmp_path / "grpo_saved_lora"))
    asked = model.fast_generate(
        text, max_tokens=6, temperature=0.8, top_p=0.95, seed=1,
        lora_request=model.load_lora(str(tmp_path / "grpo_saved_lora")),
    )  # fmt: skip
    assert isinstance(plain[0].outputs[0].text, str)
    assert len(asked[0].outputs[0].token_ids) <= 6

    # The last cells save merged weights, the adapter alone, and GGUF.
    model.save_pretrained_merged(str(tmp_path / "m"), tokenizer, save_method="merged_16bit")
    model.save_pretrained_merged(str(tmp_path / "l"), tokenizer, save_method="lora")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "m"))
    assert merged.dtype == torch.bfloat16
    ids = tokenizer("1+2=", return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        there, here = merged.float()(ids).logits, model(ids).logits
    assert torch.allclose(there, here, atol=0.05)
    assert (tmp_path / "l/adapter_model.safetensors").is_file()
    with pytest.raises(UnsupportedError, match=r"llama\.cpp's converter") as gguf:
        model.save_pretrained_gguf("model", tokenizer, quantization_method="q4_k_m")
    assert "convert_hf_to_gguf.py model" in str(gguf.value.fix)
    with pytest.raises(UnsupportedError, match="differ from the trained model"):
        model.save_pretrained_merged("x", tokenizer, save_method="merged_4bit")


@pytest.mark.slow
def test_gsm8k_with_qwen_and_half_precision_flags(folder: Path, tmp_path: Path) -> None:
    """Qwen 2.5 3B: older notebook with PatchFastRL; bf16 or fp16 depends on the GPU."""
    from toolkit import PatchFastRL, is_bfloat16_supported

    PatchFastRL("GRPO", FastLanguageModel)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder), dtype=torch.bfloat16, max_lora_rank=64,
        gpu_memory_utilization=0.5, **SMALL_MODEL,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(model, r=64, target_modules=TARGETS, lora_alpha=64)
    args = config(
        tmp_path, learning_rate=5e-6, warmup_ratio=0.1, num_generations=8,
        per_device_train_batch_size=8, bf16=is_bfloat16_supported(),
        fp16=not is_bfloat16_supported(),
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[varies, correct], args=args,
        train_dataset=chats(),
    )  # fmt: skip
    trainer.train()
    assert trained_layers(model)


@pytest.mark.slow
def test_gemma_with_fast_model(folder: Path, tmp_path: Path) -> None:
    """Gemma 3 1B: FastModel, finetune_* arguments, named template, 4 accumulation steps."""
    from toolkit.chat_templates import get_chat_template

    model, tokenizer = FastModel.from_pretrained(
        model_name=str(folder), load_in_8bit=False, full_finetuning=False, **SMALL_MODEL
    )
    with pytest.raises(UnsupportedError, match="finetune_vision_layers=True"):
        FastModel.get_peft_model(model, finetune_vision_layers=True, r=8)
    model = FastModel.get_peft_model(
        model, finetune_vision_layers=False, finetune_language_layers=True,
        finetune_attention_modules=True, finetune_mlp_modules=True, r=8, lora_alpha=8,
        lora_dropout=0, bias="none", random_state=3407,
    )  # fmt: skip
    with pytest.raises(ConfigValueError, match="template of another family"):
        get_chat_template(tokenizer, chat_template="gemma-3")
    start, end = "<start_working_out>", "<end_working_out>"
    pattern = re.compile(rf"^[\s]{{0,}}{start}.+?{end}.*$", flags=re.MULTILINE | re.DOTALL)

    def matches(completions: Any, **kwargs: Any) -> list[float]:
        return [3.0 if pattern.search(c[0]["content"]) else 0.0 for c in completions]

    args = config(
        tmp_path, learning_rate=5e-6, optim="adamw_torch_fused", num_generations=4,
        per_device_train_batch_size=1, gradient_accumulation_steps=4, max_grad_norm=0.1,
    )  # fmt: skip
    GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[matches, varies], args=args,
        train_dataset=chats(),
    ).train()  # fmt: skip
    inputs = tokenizer(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "1+1"}], add_generation_prompt=True, tokenize=False
        ),
        return_tensors="pt",
    )
    inputs.pop("token_type_ids", None)
    said = model.generate(**inputs, max_new_tokens=6, temperature=1.0, top_p=0.95, top_k=64)
    assert said.shape[1] > inputs["input_ids"].shape[1]
    names = {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad}
    assert names == set(TARGETS)


@pytest.mark.slow
def test_phi_with_three_targets(folder: Path, tmp_path: Path) -> None:
    """Phi-4: LoRA rank 16 on the MLP and the Dr. GRPO loss."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_lora_rank=16, gpu_memory_utilization=0.7, **SMALL_MODEL
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=["gate_proj", "up_proj", "down_proj"], lora_alpha=16
    )
    args = config(
        tmp_path, num_generations=6, per_device_train_batch_size=6, loss_type="dr_grpo",
        scale_rewards=False, epsilon_high=0.28, delta=1.5, mask_truncated_completions=True,
        importance_sampling_level="sequence", beta=0.0,
    )  # fmt: skip
    GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=varies, args=args,
        train_dataset=chats(),
    ).train()  # fmt: skip


@pytest.mark.slow
def test_advanced_grpo_with_an_sft_start(folder: Path, tmp_path: Path) -> None:
    """Qwen3 base: custom chat template, one SFT step, then GRPO with vllm_sampling_params."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_lora_rank=32, gpu_memory_utilization=0.9, **SMALL_MODEL
    )
    model = FastLanguageModel.get_peft_model(
        model, r=32, target_modules=TARGETS, lora_alpha=64, use_gradient_checkpointing="unsloth"
    )
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + eos_token }}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    )
    texts = questions(4).map(
        lambda row: {
            "text": tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ],
                tokenize=False,
            )
        }
    )
    sft = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=texts.select_columns("text"),
        args=SFTConfig(
            dataset_text_field="text", per_device_train_batch_size=1, max_steps=1, bf16=False,
            learning_rate=2e-4, logging_steps=5, report_to="none", use_cpu=True, seed=3407,
            output_dir=str(tmp_path / "sft"), save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    sft.train()
    started = trained_layers(model)
    assert started
    inputs = tokenizer(texts[0]["text"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model.generate(**inputs, temperature=0, do_sample=False, max_new_tokens=4)

    longest = 60
    params = {"min_p": 0.1, "top_p": 1.0, "top_k": -1, "seed": 3407}
    with pytest.warns(ToolkitWarning, match="vllm_sampling_params is read as fields"):
        args = config(
            tmp_path, vllm_sampling_params=params, temperature=1.0, learning_rate=5e-6,
            weight_decay=0.001, warmup_ratio=0.1, lr_scheduler_type="linear", logging_steps=1,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, num_generations=4,
            max_prompt_length=longest, max_completion_length=96 - longest,
        )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[correct, varies], args=args,
        train_dataset=chats(),
    )  # fmt: skip
    trainer.train()
    assert trainer.min_p == 0.1


def test_a_vision_notebook_is_an_error_of_one_line(folder: Path) -> None:
    from toolkit import FastVisionModel

    with pytest.raises(UnsupportedError) as caught:
        FastVisionModel.from_pretrained(
            model_name="some/vision-model", max_seq_length=16384, load_in_4bit=True
        )
    assert "only text models are supported" in str(caught.value)
    assert "FastLanguageModel" in str(caught.value.fix)


STRATEGY = "def add(a, b):\n    return a + b\n"


def function_in(text: str) -> str | None:
    """The first fenced block, found with the pattern of the gpt-oss kernel notebooks."""
    match = re.search(r"```(?:python)?\n(.*?)```", text, flags=re.DOTALL)
    return match[1] if match else None


def share_of_passed_tests(source: str | None, tests: list[tuple[int, int, int]]) -> float:
    if source is None:
        return -2.0
    scope: dict[str, Any] = {}
    try:
        exec(source, {"__builtins__": {}}, scope)  # noqa: S102 - the notebook does so
        return sum(scope["add"](a, b) == c for a, b, c in tests) / len(tests)
    except Exception:  # noqa: BLE001 - code of the model may raise anything
        return -1.0


@pytest.mark.slow
def test_gpt_oss_with_rewards_that_run_generated_code(folder: Path, tmp_path: Path) -> None:
    """gpt-oss 20B: no engine; offload_embedding is refused; one prompt in all rows; the rewards run
    the generated code; a TextStreamer prints a completion after the training.
    """
    from datasets import Dataset
    from transformers import TextStreamer

    with pytest.raises(UnsupportedError, match="offload_embedding=True"):
        FastLanguageModel.from_pretrained(str(folder), offload_embedding=True, **SMALL_MODEL)
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **SMALL_MODEL)
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=TARGETS, lora_alpha=8, use_gradient_checkpointing="unsloth"
    )
    prompt = [{"role": "user", "content": "write add(a, b)."}]
    rows = Dataset.from_list([{"prompt": prompt, "answer": 0, "reasoning_effort": "low"}] * 20)
    tests = [(1, 2, 3), (0, 5, 5)]

    def function_works(completions: Any, **kwargs: Any) -> list[float]:
        return [share_of_passed_tests(function_in(c[0]["content"]), tests) for c in completions]

    def no_cheating(completions: Any, **kwargs: Any) -> list[float]:
        return [-20.0 if "import" in c[0]["content"] else 1.0 for c in completions]

    assert share_of_passed_tests(function_in(f"so:\n```python\n{STRATEGY}```"), tests) == 1.0
    args = config(
        tmp_path, temperature=1.0, learning_rate=5e-5, weight_decay=0.01, warmup_ratio=0.1,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, num_generations=2,
    )  # fmt: skip
    GRPOTrainer(
        model=model, processing_class=tokenizer, args=args, train_dataset=rows,
        reward_funcs=[function_works, no_cheating, varies],
    ).train()  # fmt: skip
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model.generate(**inputs, max_new_tokens=4, streamer=TextStreamer(tokenizer, skip_prompt=True))


WORD = "cab"


def hint(guess: str) -> str:
    """A Wordle hint: + for a correct letter, ? for a letter at another position, - otherwise."""
    pairs = zip(guess.ljust(3)[:3], WORD, strict=True)
    return "".join("+" if a == b else "?" if a in WORD else "-" for a, b in pairs)


@pytest.mark.slow
def test_a_game_of_several_turns_with_rollout_func(folder: Path, tmp_path: Path) -> None:
    """Wordle as in the environment notebooks: two guesses with a hint between them. The tokens of
    the hint are masked, and the reward is computed from the hint.
    """
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **SMALL_MODEL)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS, lora_alpha=8)

    def play(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            n: [] for n in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "hints")
        }
        texts = [
            tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
        asked = [tokenizer(text).input_ids for text in texts]
        first = model.fast_generate(asked, max_tokens=3, temperature=1.0, seed=5, logprobs=0)
        for ids, answer in zip(asked, first, strict=True):
            guess = list(answer.outputs[0].token_ids)
            said = hint(answer.outputs[0].text)
            told = tokenizer(f" {said} ", add_special_tokens=False).input_ids
            second = model.fast_generate([[*ids, *guess, *told]], max_tokens=3, seed=6, logprobs=0)
            again = list(second[0].outputs[0].token_ids)
            found["prompt_ids"].append(ids)
            found["completion_ids"].append([*guess, *told, *again])
            found["logprobs"].append(None)
            found["env_mask"].append([1] * len(guess) + [0] * len(told) + [1] * len(again))
            found["hints"].append(said)
        found.pop("logprobs")
        return {**found, "logprobs": None}

    def closeness(completions: Any, hints: list[str], **kwargs: Any) -> list[float]:
        return [said.count("+") + 0.5 * said.count("?") + 0.01 * i for i, said in enumerate(hints)]

    args = config(tmp_path, num_generations=4, per_device_train_batch_size=4)
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=closeness, args=args,
        train_dataset=chats(), rollout_func=play,
    )  # fmt: skip
    trainer.train()
    assert trained_layers(model)


@pytest.mark.slow
def test_held_out_rows_are_evaluated_during_training(folder: Path, tmp_path: Path) -> None:
    """Llama 3.2 with evaluation: half of the rows are held out and evaluated at each step. A second
    training starts from the saved adapter.
    """
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **SMALL_MODEL)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS, lora_alpha=8)
    both = chats().train_test_split(test_size=0.5, seed=1)
    args = config(
        tmp_path, num_generations=4, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        evaluation_strategy="steps", eval_steps=1, fp16_full_eval=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[varies], args=args,
        train_dataset=both["train"], eval_dataset=both["test"],
    )  # fmt: skip
    trainer.train()
    assert any("eval_reward" in row for row in trainer.state.log_history)
    saved = model.save_lora(tmp_path / "saved")
    again, tokenizer = FastLanguageModel.from_pretrained(str(saved), **SMALL_MODEL)
    GRPOTrainer(
        model=again, processing_class=tokenizer, reward_funcs=[varies],
        args=config(tmp_path, num_generations=4, per_device_train_batch_size=4),
        train_dataset=both["train"],
    ).train()  # fmt: skip
