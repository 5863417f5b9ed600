"""The call patterns of the Qwen3 4B notebook with fast_inference=True, on the real engine.
tests/acceptance/test_notebooks.py tests the other notebooks.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "acceptance"))

from notebook_world import SHORT_RUN, TARGETS, chats, correct, make_folder, trained_layers, varies

from toolkit.base.errors import ToolkitWarning

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_qwen_on_the_engine(tmp_path: Path, monkeypatch: Any) -> None:
    """The environment variable sets standby, GRPOConfig accepts vLLM's SamplingParams, and after
    the training the saved adapter can be requested.
    """
    from vllm import SamplingParams

    from toolkit import FastLanguageModel, GRPOConfig, GRPOTrainer

    folder = make_folder(tmp_path / "tiny")
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    with pytest.warns(ToolkitWarning, match="is read as enable_sleep_mode=True"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=str(folder), max_seq_length=96, load_in_4bit=False, fast_inference=True,
            max_lora_rank=8, gpu_memory_utilization=0.9, max_num_seqs=8,
            max_num_batched_tokens=512, kv_cache_bytes=1 << 26,
        )  # fmt: skip
    with model.toolkit_engine as engine:
        assert engine.options.enable_sleep_mode
        model = FastLanguageModel.get_peft_model(
            model, r=8, target_modules=TARGETS, lora_alpha=16, use_gradient_checkpointing="unsloth",
            random_state=3407,
        )  # fmt: skip
        params = SamplingParams(
            min_p=0.1, top_p=0.95, top_k=20, seed=3407, stop=[tokenizer.eos_token],
            include_stop_str_in_output=True,
        )  # fmt: skip
        with pytest.warns(ToolkitWarning, match="vllm_sampling_params is read as fields"):
            args = GRPOConfig(
                vllm_sampling_params=params, temperature=1.0, learning_rate=5e-3, num_generations=4,
                per_device_train_batch_size=4, gradient_accumulation_steps=1, logging_steps=1,
                report_to="none", output_dir=str(tmp_path / "outputs"), **SHORT_RUN,
            )  # fmt: skip
        assert (args.min_p, args.top_p, args.top_k) == (0.1, 0.95, 20)
        trainer = GRPOTrainer(
            model=model, processing_class=tokenizer, reward_funcs=[correct, varies], args=args,
            train_dataset=chats(),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        assert trained_layers(model)
        sampling = trainer.vllm_generation.sampling_options(4)
        assert (sampling.min_p, sampling.extra["stop"]) == (0.1, [tokenizer.eos_token])

        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "1+2=?"}], add_generation_prompt=True, tokenize=False
        )
        model.save_lora(str(tmp_path / "saved"))
        greedy = SamplingParams(temperature=0, max_tokens=8)
        engine_results = model.fast_generate(
            text, sampling_params=greedy, lora_request=model.load_lora(str(tmp_path / "saved"))
        )
        ids = tokenizer(text, return_tensors="pt")
        ids.pop("token_type_ids", None)
        transformers_ids = model.generate(**ids, max_new_tokens=8, do_sample=False)
        engine_ids = list(engine_results[0].outputs[0].token_ids)
        assert (
            transformers_ids[0, ids["input_ids"].shape[1] :].tolist()[: len(engine_ids)]
            == engine_ids
        )
