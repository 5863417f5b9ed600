"""Arguments of scripts for GRPOConfig and GRPOTrainer: older fields, batches, rewards."""

from __future__ import annotations

import asyncio
import re
import warnings
from functools import partial

import pytest
import torch
from datasets import Dataset
from trainer_helpers import ROWS, arguments, make_policy, make_trainer, ones, put_engine

import toolkit
from toolkit import GRPOConfig
from toolkit.base.errors import ConfigError, ConfigTypeError, ConfigValueError, ToolkitWarning
from toolkit.policy.fast_generate import generate
from toolkit.policy.load_request import apply_standby_variable
from toolkit.policy.notebook_templates import CHATML, get_chat_template, standardize_sharegpt
from toolkit.policy.saving import gguf_recipe
from toolkit.train.demo import make_tokenizer
from toolkit.train.rewards.script_rewards import wrap_reward_funcs
from toolkit.train.trainer import GRPOTrainer

# --- fields of older releases


def config(folder, **fields):
    """(the config, the text of the warning about its fields)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = GRPOConfig(output_dir=str(folder), use_cpu=True, **fields)
    messages = [str(warning.message) for warning in caught if warning.category is ToolkitWarning]
    assert len(messages) <= 1  # one warning covers all fields
    return result, messages[0] if messages else ""


def test_fields_of_older_releases_are_translated_with_one_warning(tmp_path):
    made, message = config(
        tmp_path,
        max_prompt_length=256,
        warmup_ratio=0.1,
        evaluation_strategy="no",
        vllm_guided_decoding_regex="[0-9]+",
        kl_coef=0.04,
        unsloth_num_chunks=-1,
        logging_dir="logs",
        vllm_device="cuda:0",
    )
    assert (made.max_prompt_length, made.warmup_steps, made.beta) == (256, 0.1, 0.04)
    assert made.vllm_structured_outputs_regex == "[0-9]+"
    for words in (
        "warmup_ratio=0.1 is now warmup_steps=0.1",
        "evaluation_strategy is now called eval_strategy",
        "kl_coef is now called beta",
        "unsloth_num_chunks is left out",
        "logging_dir is left out: the variable TENSORBOARD_LOGGING_DIR",
        "vllm_device is left out: FastLanguageModel.from_pretrained sets it",
    ):
        assert words in message
    assert config(tmp_path, warmup_ratio=0.1, warmup_steps=5)[0].warmup_steps == 5


def test_vllm_sampling_params_become_fields(tmp_path):
    params = toolkit.vLLMSamplingParams(
        min_p=0.1, top_p=0.9, top_k=-1, seed=3407, stop=["</s>"], include_stop_str_in_output=True
    )
    made, message = config(tmp_path, temperature=0.7, vllm_sampling_params=params)
    assert (made.min_p, made.top_p, made.top_k, made.temperature) == (0.1, 0.9, -1, 0.7)
    assert made.generation_kwargs == {"stop": ["</s>"]}
    assert "include_stop_str_in_output is left out (this keyword changes only" in message
    assert "seed is left out (each completion is drawn from its own seed" in message
    made, message = config(tmp_path, temperature=0.7, vllm_sampling_params={"temperature": 1.2})
    assert made.temperature == 0.7
    assert "is ignored, because GRPOConfig sets temperature=0.7" in message
    with pytest.raises(ConfigTypeError, match="vllm_sampling_params has the type str"):
        config(tmp_path, vllm_sampling_params="greedy")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gradient_accumulation_step": 2}, "did you mean 'gradient_accumulation_steps'"),
        ({"dataset_text_field": "text"}, "In a run file, this option is dataset.prompt"),
        ({"kl_coef": 0.1, "beta": 0.2}, "kl_coef is the older name of beta, but kl_coef=0.1 and"),
        ({"warmup_ratio": 1}, "warmup_ratio=1 must be at least 0 and below 1"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be a number of tokens above 0"),
    ],
)
def test_an_unknown_field_is_an_error_with_its_name(tmp_path, fields, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(tmp_path, **fields)


# --- batches that hold whole groups


@pytest.mark.parametrize(
    "fields",
    [
        {"per_device_train_batch_size": 1, "num_generations": 6},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 6},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_generations": 6},
        {"per_device_train_batch_size": 4, "generation_batch_size": 16, "num_generations": 6},
        {"per_device_eval_batch_size": 8, "per_device_train_batch_size": 6, "num_generations": 6,
         "eval_strategy": "steps", "eval_steps": 1},
    ],
)  # fmt: skip
def test_every_batch_size_that_the_message_lists_is_valid(tmp_path, fields):
    with pytest.raises(ConfigValueError, match="not a multiple of num_generations=6") as caught:
        config(tmp_path, **fields)
    choices = re.findall(r"(\w+)=([\d or]+)", str(caught.value.fix))
    assert choices
    for name, values in choices:
        for value in values.strip().split(" or "):
            config(tmp_path, **{**fields, name: int(value)})


def test_batch_1_with_6_generations_lists_valid_values(tmp_path):
    with pytest.raises(ConfigValueError) as caught:
        config(tmp_path, per_device_train_batch_size=1, num_generations=6)
    assert "1 x 1 process x gradient_accumulation_steps 1)" in str(caught.value)
    assert "per_device_train_batch_size=6; gradient_accumulation_steps=6" in str(caught.value)


# --- rewards of a script


def no_kwargs(completions):
    return [1.0 for _ in completions]


def nothing(completions, **kwargs):
    return None


def scalar(completions, **kwargs):
    return 1.0


def words(completions, **kwargs):
    return ["good" for _ in completions]


def nested(completions, **kwargs):
    return [[1.0] for _ in completions]


async def later(completions, **kwargs):
    return ["good" for _ in completions]


def make_script_trainer(tmp_path, rewards, model=None, **grpo):
    grpo_fields = {"max_steps": 1, "max_completion_length": 2, **grpo}
    return GRPOTrainer(
        model=model or make_policy(),
        reward_funcs=rewards,
        args=arguments(tmp_path, **grpo_fields),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (nothing, "reward nothing returned a NoneType, not a list of rewards"),
        (scalar, "reward scalar returned a float, not a list of rewards"),
        (words, "reward words returned a str as a reward (sample 0 of 8)"),
        (nested, "reward nested returned a list as a reward (sample 0 of 8)"),
        (later, "reward later returned a str as a reward (sample 0 of 8)"),
    ],
)
def test_a_wrong_reward_has_the_message_of_a_run_file(reward, message):
    [call] = wrap_reward_funcs([reward])

    def score():
        found = call(completions=["1"] * 8)
        return asyncio.run(found) if reward is later else found

    with pytest.raises(ConfigValueError, match=re.escape(message)) as caught:
        score()
    assert "one number (or None) for each completion" in str(caught.value.fix)


def test_training_ends_with_the_message_for_a_wrong_reward(tmp_path):
    with pytest.raises(ConfigValueError, match="reward words returned a str as a reward"):
        make_script_trainer(tmp_path, [ones, words]).train()


@pytest.mark.parametrize(("rows", "fix"), [(0, "at least 3 prompts$"), (2, "at most 8 completion")])
def test_too_few_prompts_are_an_error_and_not_a_training_without_steps(tmp_path, rows, fix):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=12)
    trainer.train_dataset = trainer.train_dataset.select(range(rows))
    with pytest.raises(
        ConfigError, match=f"the number of prompts is {rows}, but one generation needs 3"
    ) as refused:
        trainer.train()
    assert re.search(fix, refused.value.fix)


def test_rewards_that_cannot_be_called_are_errors_before_training(tmp_path):
    with pytest.raises(
        ConfigError, match=re.escape("reward no_kwargs has the parameters (completions)")
    ) as e:
        make_script_trainer(tmp_path, no_kwargs)
    assert e.value.fix == "add **kwargs at the end of the parameters of the function"
    with pytest.raises(ConfigTypeError, match="must be a function, not list"):
        make_script_trainer(tmp_path, [[1.0]])


def test_rewards_of_every_kind_keep_their_names(tmp_path):
    class Scorer:
        def __call__(self, completions, **kwargs):
            return torch.tensor([float("nan"), *[0.5] * (len(completions) - 1)])

    def scaled(completions, factor, **kwargs):
        return [None, *[factor] * (len(completions) - 1)]

    def broken(completions, **kwargs):
        raise KeyError("answer")

    trainer = make_script_trainer(tmp_path, [ones, Scorer(), partial(scaled, factor=2)])
    assert trainer.reward_func_names == ["ones", "Scorer", "scaled"]
    trainer.train()
    assert trainer.state.log_history[0]["rewards/scaled/mean"] == 2
    with pytest.raises(KeyError, match="answer"):  # the exception of the reward, unchanged
        make_script_trainer(tmp_path, broken).train()


# --- lengths, packages, keywords of another engine


def test_max_prompt_length_truncates_the_start_with_a_warning(tmp_path):
    trainer = make_script_trainer(tmp_path, ones)
    trainer.args.max_prompt_length = 2
    with pytest.warns(ToolkitWarning, match="more than max_prompt_length=2"):
        ids, _, _ = trainer._tokenize_prompts(["12+34=", "7="])
    tokenizer = make_tokenizer()
    assert tokenizer.batch_decode(ids) == ["4=", "7="]


def test_max_seq_length_limits_prompt_and_completion_without_an_engine(tmp_path):
    model = make_policy()
    model.max_seq_length = 8
    with pytest.raises(ConfigError, match="max_completion_length=8 leaves no room for a prompt"):
        make_script_trainer(tmp_path, ones, model=model, max_completion_length=8)
    trainer = make_script_trainer(tmp_path, ones, model=model, max_completion_length=7)
    prompt_ids, completion_ids, *_ = trainer._generate(["12+34="] * 4 + ["7="] * 4)
    lengths = [len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    assert max(lengths) <= 8
    assert max(map(len, completion_ids[4:])) > 2  # a short prompt has more room


def test_all_mistakes_in_a_config_are_in_one_error(tmp_path):
    with pytest.raises(ConfigTypeError) as caught:
        config(
            tmp_path,
            num_generation=4,
            warmup_ratio=2,
            max_prompt_length=0,
            dynamic_sampling="yes",
            per_device_train_batch_size=1,
            num_generations=6,
        )
    message = str(caught.value)
    assert message.startswith("GRPOConfig: 5 mistakes\n- 'num_generation' is not a field")
    for words in (
        "(did you mean 'num_generations'?)",
        "- warmup_ratio=2 must be at least 0 and below 1",
        "- max_prompt_length=0 must be a number of tokens above 0",
        "- dynamic_sampling='yes' must be True or False",
        "This number is not a multiple of num_generations=6",
    ):
        assert words in message
    assert message.count("fix: ") == 5


def test_an_error_of_trl_is_listed_with_the_errors_of_the_toolkit(tmp_path):
    with pytest.raises(ConfigValueError) as caught:
        config(tmp_path, curriculum_share=2, auto_find_batch_size=True)
    assert "2 mistakes" in str(caught.value)
    assert "auto_find_batch_size is not supported" in str(caught.value)
    with pytest.raises(ValueError, match="auto_find_batch_size") as alone:
        config(tmp_path, auto_find_batch_size=True)
    assert not isinstance(alone.value, ConfigError)  # TRL's exception, unchanged


def test_all_mistakes_in_the_arguments_of_a_trainer_are_in_one_error(tmp_path):
    model = make_policy()
    model.max_seq_length = 8
    with pytest.raises(ConfigError) as caught:
        make_script_trainer(tmp_path, no_kwargs, model=model, optim="lomo", max_completion_length=8)
    message = str(caught.value)
    assert message.startswith("3 mistakes\n- ")
    assert "reward no_kwargs has the parameters (completions)" in message
    assert "\n- grpo.optim: lomo needs" in message
    assert "leaves no room for a prompt" in message


def test_packages_of_the_config_are_checked_at_construction(tmp_path):
    given = {"report_to": ["dvclive"]}
    with pytest.raises(ImportError, match="report_to: dvclive needs dvclive"):
        make_script_trainer(tmp_path, ones, **given)


@pytest.mark.parametrize("engine", [False, True])
def test_sampling_keywords_of_another_engine_are_errors_at_construction(tmp_path, engine):
    model = make_policy()
    if engine:
        put_engine(model, make_tokenizer())
    with pytest.raises(ConfigValueError, match="include_stop_str_in_output"):
        make_script_trainer(
            tmp_path, ones, model, generation_kwargs={"include_stop_str_in_output": True}
        )


# --- generate right after training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generate_after_train_equals_generate_in_evaluation_mode(tmp_path, checkpointing):
    trainer = make_trainer(
        tmp_path, max_steps=1, lora={"lora_dropout": 0.3}, gradient_checkpointing=checkpointing
    )
    trainer.train()
    model, tokenizer = trainer.model, make_tokenizer()
    assert model.training
    inputs = tokenizer(["12+34="], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ours = generate(model, **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert model.training
    ids = inputs["input_ids"]
    model.eval()
    for _ in range(12):  # without a KV cache
        scores = model(ids).logits[:, -1]
        scores[:, tokenizer.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert ours.tolist() == ids.tolist()


# --- names that notebooks import


def test_notebook_names_can_be_imported():
    from toolkit import FastVisionModel, PatchFastRL, is_bfloat16_supported
    from toolkit.chat_templates import train_on_responses_only

    assert is_bfloat16_supported() in (True, False)
    with pytest.warns(ToolkitWarning, match="from toolkit import GRPOConfig, GRPOTrainer"):
        PatchFastRL("GRPO", toolkit.FastLanguageModel)
    with pytest.raises(NotImplementedError, match="only text models are supported"):
        FastVisionModel.from_pretrained("some/vlm", load_in_4bit=True)
    with pytest.raises(NotImplementedError, match="supervised fine-tuning"):
        train_on_responses_only(None, instruction_part="<a>")
    with pytest.raises(ImportError, match=r"toolkit has no UnslothTrainer: use trl\.SFTTrainer"):
        from toolkit import UnslothTrainer  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'FastSomething'"):
        from toolkit import FastSomething  # noqa: F401


def test_chat_templates():
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigValueError, match="the tokenizer has no chat template"):
        get_chat_template(tokenizer, "llama-3.1")
    assert get_chat_template(tokenizer, "chatml").chat_template == CHATML
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert get_chat_template(tokenizer, "qwen-2.5").chat_template == CHATML
    with pytest.raises(ConfigValueError, match="a chat template of another family"):
        get_chat_template(tokenizer, "gemma-3")
    with pytest.raises(NotImplementedError, match="keys role and content"):
        get_chat_template(tokenizer, "chatml", mapping={"role": "from", "content": "value"})
    own = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert get_chat_template(tokenizer, own).chat_template == own


def test_sharegpt_rows_are_converted_to_role_and_content():
    turns = [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]
    rows = standardize_sharegpt(Dataset.from_list([{"conversations": turns}]))
    assert [(t["role"], t["content"]) for t in rows[0]["conversations"]] == [
        ("user", "1+1="), ("assistant", "2")]  # fmt: skip


def test_standby_sets_kv_sleep():
    asked = {"UNSLOTH_VLLM_STANDBY": "1"}
    with pytest.warns(ToolkitWarning, match="enable_sleep_mode=True"):
        assert apply_standby_variable({"fast_inference": True}, asked)["enable_sleep_mode"] is True
    with pytest.warns(ToolkitWarning, match="no effect with fast_inference=False"):
        assert "enable_sleep_mode" not in apply_standby_variable({"fast_inference": False}, asked)
    assert apply_standby_variable({"fast_inference": True}, {}) == {"fast_inference": True}


def test_gguf_is_an_error_with_an_explanation():
    recipe = gguf_recipe("out", ["q4_k_m"])
    assert "convert_hf_to_gguf.py out --outfile out/f16.gguf --outtype f16" in recipe
    assert "llama-quantize out/f16.gguf out/q4_k_m.gguf q4_k_m" in recipe
