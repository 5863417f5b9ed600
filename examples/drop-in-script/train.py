"""GRPO in the form of Unsloth's notebooks: teach a model to answer sums with a bare number."""

import argparse
import random

from datasets import Dataset

from toolkit import FastLanguageModel, GRPOConfig, GRPOTrainer


def problems(count: int) -> Dataset:
    """Sums of two numbers, the same ones each time."""
    draw = random.Random(0)
    pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs])


def correct(completions, answer, **kwargs):
    """1 for the right number and nothing else, a tenth for a number."""
    scores = []
    for text, right in zip(completions, answer, strict=True):
        said = text.strip()
        scores.append(1.0 if said == right else 0.1 if said.isdigit() else 0.0)
    return scores


def main() -> None:
    """Load, add the adapter, train, sample, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/script")
    parser.add_argument("--no-engine", action="store_true", help="Hugging Face generation")
    given = parser.parse_args()

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=given.model,
        max_seq_length=256,
        load_in_4bit=False,
        fast_inference=not given.no_engine,
        max_lora_rank=16,
        gpu_memory_utilization="auto",
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[correct],
        args=GRPOConfig(
            output_dir=given.out,
            max_steps=given.steps,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=8,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=problems(256),
    )
    trainer.train()
    print(model.fast_generate(["12+30="])[0].outputs[0].text)  # noqa: T201
    model.save_lora(f"{given.out}/adapter")


if __name__ == "__main__":
    main()
