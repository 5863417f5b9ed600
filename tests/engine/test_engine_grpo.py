"""TRL's GRPO on the real engine: every loss and option, tools, and evaluation. Training must not
change the base weights, and equal seeds must give equal runs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_training as training
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from toolkit import GRPOConfig, GRPOTrainer
from toolkit.base.errors import ConfigValueError, ToolkitWarning, UnsupportedError
from toolkit.config.libraries import allowed_values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning"),
]

TOLERANCE = 1e-5  # nats, float32


@pytest.fixture(autouse=True)
def silence_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.print", lambda *a, **k: None)  # HF's PrinterCallback


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """(model with its engine, tokenizer), shared by the tests of the module."""
    from tiny_llama import make_tiny

    model, tokenizer = training.load_with_engine(
        make_tiny(tmp_path_factory.mktemp("grpo") / "model")
    )
    with model.toolkit_engine:
        yield model, tokenizer


@pytest.fixture
def policy(loaded: tuple[Any, Any]) -> Iterator[Any]:
    with training.temporary_adapter(loaded[0]) as policy:
        yield policy


def train_run(loaded: Any, folder: Path, **grpo: Any) -> tuple[list[dict[str, Any]], str, str]:
    """Train a new adapter; return (logged steps, completions as JSON, checksum of the adapter)."""
    trainer_arguments, completions_seen = grpo.pop("more", {}), []

    def record_completions(completions: list[str], **_: Any) -> list[float]:
        completions_seen.append(list(completions))
        return training.digit_reward(completions)

    with training.temporary_adapter(loaded[0], **grpo.pop("lora", {})) as policy:
        trainer = training.make_trainer(
            policy,
            loaded[1],
            folder,
            trainer_arguments={"reward_funcs": record_completions, **trainer_arguments},
            **grpo,
        )
        trainer.train()
        return (
            training.logged_steps(trainer),
            json.dumps(completions_seen),
            training.adapter_checksum(policy),
        )


# --- unchanged base weights and reproducible runs


def test_fifty_steps_do_not_change_the_engines_tensors(loaded, policy, tmp_path) -> None:
    engine = policy.toolkit_engine
    before, untrained = training.engine_checksums(engine), training.adapter_checksum(policy)
    trainer = training.make_trainer(policy, loaded[1], tmp_path, max_steps=50)
    trainer.train()
    rows = training.logged_steps(trainer)
    assert len(rows) == 50
    assert training.adapter_checksum(policy) != untrained
    assert training.engine_checksums(engine) == before
    assert len(before) > 20
    assert max(row["sampling/logp_gap_max"] for row in rows) < TOLERANCE
    # The rewards have increased, so the tensors were unchanged although the steps had an effect.
    assert sum(r["reward"] for r in rows[-5:]) > sum(r["reward"] for r in rows[:5]) + 1
    request = policy.load_lora(policy.save_lora(tmp_path / "saved"))
    prompts = ["2+3=", "5+5="]
    greedy = {"max_tokens": 8, "temperature": 0}
    trained_ids = [a.outputs[0].token_ids for a in policy.fast_generate(prompts, **greedy)]
    saved = policy.fast_generate(prompts, lora_request=request, **greedy)
    base = policy.fast_generate(prompts, lora_request=None, **greedy)
    assert [a.outputs[0].token_ids for a in saved] == trained_ids
    assert [a.outputs[0].token_ids for a in base] != trained_ids


def test_an_adapter_that_trl_adds_is_trained_and_sampled(loaded, tmp_path) -> None:
    """TRL adds the adapter of ``peft_config`` without get_peft_model. ``bf16`` keeps its default in
    the config, although the engine is float32.
    """
    model, before = loaded[0], training.engine_checksums(loaded[0].toolkit_engine)
    layers = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    data = Dataset.from_list(training.ROWS)

    def make_trl_trainer(**peft: Any) -> GRPOTrainer:
        config = GRPOConfig(str(tmp_path), max_steps=3, learning_rate=1e-2, logging_steps=1,
                            num_generations=4, max_completion_length=8, save_strategy="no",
                            report_to=[], use_cpu=True, gradient_checkpointing=False)  # fmt: skip
        return GRPOTrainer(model, training.digit_reward, config, data, processing_class=loaded[1],
                           peft_config=LoraConfig(**{**layers, **peft}))  # fmt: skip

    for refused in ({"init_lora_weights": "olora"}, {"bias": "all"}, {"use_dora": True}):
        with pytest.raises(UnsupportedError, match="peft_config"):
            make_trl_trainer(**refused)
    with pytest.raises(ConfigValueError, match="peft_config: r=16 is above max_lora_rank=8"):
        make_trl_trainer(r=16)
    trainer = make_trl_trainer()
    try:
        trainer.train()
        gaps = [row["sampling/logp_gap_max"] for row in training.logged_steps(trainer)]
        assert max(gaps) < TOLERANCE
        assert trainer.base_check["unchanged"]
        assert training.engine_checksums(model.toolkit_engine) == before
        assert (trainer.model.save_lora(tmp_path / "adapter") / "base.json").is_file()
    finally:
        trainer.model.unload()


def test_a_changed_base_model_is_refused(loaded, policy, tmp_path) -> None:
    weight = loaded[0].get_parameter("model.norm.weight")
    original = weight.detach().clone()
    weight.data.mul_(1.5)
    try:
        with pytest.raises(ConfigValueError, match=r"changed after .* loaded it: .*norm\.weight"):
            training.make_trainer(policy, loaded[1], tmp_path)
    finally:
        weight.data.copy_(original)
    weight.requires_grad_(True)
    try:
        with pytest.raises(UnsupportedError, match=r"the engine samples: .*norm\.weight"):
            training.make_trainer(policy, loaded[1], tmp_path)
    finally:
        weight.requires_grad_(False)


def test_one_seed_gives_one_run_whatever_ran_before(loaded, tmp_path) -> None:
    first = train_run(loaded, tmp_path / "a", max_steps=4)
    other = train_run(
        loaded, tmp_path / "b", max_steps=3, seed=8, num_generations=2, temperature=1.5
    )
    with training.temporary_adapter(loaded[0], random_state=1) as policy:
        policy.fast_generate(["1+1="], max_tokens=5, temperature=1.0)
    torch.manual_seed(99)
    torch.rand(7)
    assert train_run(loaded, tmp_path / "c", max_steps=4) == first
    assert other[1] != first[1]
    assert train_run(loaded, tmp_path / "d", max_steps=4, seed=8)[1] != first[1]


# --- TRL's options

REQUIRED_OPTIONS = {
    "luspo": {"importance_sampling_level": "sequence"},
    "vespo": {"vllm_importance_sampling_mode": "token_truncate"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"loss {name}": {"loss_type": name, **REQUIRED_OPTIONS.get(name, {})}
        for name in allowed_values("loss_types").values
    },
    "num_iterations": {"num_iterations": 2, "max_steps": 4},
    "beta": {"beta": 0.1},
    "steps_per_generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing and beta": {"lora": {"use_gradient_checkpointing": True}, "beta": 0.1},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "no correction": {"vllm_importance_sampling_correction": False},
    "sequence weights": {"vllm_importance_sampling_mode": "sequence_mask"},
    "off-policy mask": {"off_policy_mask_threshold": 0.5},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "truncated masked": {"mask_truncated_completions": True},
    "unscaled": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "temperature": {"temperature": 0.7},
    "generation options": {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
    "generation_kwargs": {"generation_kwargs": {"min_tokens": 3, "logit_bias": {9: 2.0}}},
}
OTHER_DISTRIBUTION = {"generation_kwargs"}
"""Options that the training pass does not apply."""


@pytest.mark.filterwarnings("ignore:lora_dropout=0.1. the engine samples without:UserWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_trls_options_run_on_the_engine(loaded, tmp_path, name) -> None:
    rows, completions, adapter = train_run(loaded, tmp_path, **OPTIONS[name])
    assert len(rows) == OPTIONS[name].get("max_steps", 2)
    assert json.loads(completions)
    with training.temporary_adapter(loaded[0], **OPTIONS[name].get("lora", {})) as fresh:
        assert adapter != training.adapter_checksum(fresh)
    assert ("kl" in rows[0]) == ("beta" in name)
    for row in rows:  # also for steps without a new rollout
        assert row["sampling/logp_gap_max"] >= row["sampling/logp_gap_mean"] >= 0
        if name not in OTHER_DISTRIBUTION | {"dropout"}:
            assert row["sampling/logp_gap_max"] < TOLERANCE
    if name == "num_iterations":  # steps 1 and 2 share a rollout, 3 and 4 the next
        assert len(json.loads(completions)) == 2
    if name == "steps_per_generation":
        assert len(json.loads(completions)) == 1


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
def test_a_users_rollout_func_gives_the_same_run(loaded, tmp_path) -> None:
    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids, _, _ = trainer._tokenize_prompts(prompts)
        drawn = trainer.vllm_generation.generate(ids, None, trainer.num_generations)
        prompt_ids, completion_ids, logprobs, _ = drawn
        sampled = [[position[0] for position in row] for row in logprobs]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": sampled}

    logged, _, adapter = train_run(loaded, tmp_path / "a", more={"rollout_func": rollout_func})
    assert all(row["sampling/logp_gap_max"] < TOLERANCE for row in logged)
    assert adapter == train_run(loaded, tmp_path / "b")[2]  # the run without a rollout_func


def test_several_rewards_with_weights(loaded, policy, tmp_path) -> None:
    trainer = training.make_trainer(
        policy,
        loaded[1],
        tmp_path,
        trainer_arguments={"reward_funcs": [training.digit_reward, training.short_reward]},
        reward_weights=[1.0, 0.25],
    )
    trainer.train()
    for row in training.logged_steps(trainer):
        parts = row["rewards/digit_reward/mean"] + 0.25 * row["rewards/short_reward/mean"]
        assert row["reward"] == pytest.approx(parts, abs=1e-6)


def test_evaluation_while_training(loaded, tmp_path) -> None:
    """Evaluation samples from the current adapter and does not change the rollouts of training."""
    expected, _, _ = train_run(loaded, tmp_path / "a")
    with training.temporary_adapter(loaded[0]) as policy:
        trainer = training.make_trainer(
            policy,
            loaded[1],
            tmp_path / "b",
            trainer_arguments={"eval_dataset": Dataset.from_list(training.ROWS[:4])},
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
    evals = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert [row["step"] for row in evals] == [1, 2]
    assert all(row["eval_sampling/logp_gap_max"] < TOLERANCE for row in evals)
    # TRL shuffles the rows of a batch with the global generator, which evaluation advances. The
    # rows are equal but in another order, so the metrics are equal up to rounding.
    for actual, expected_row in zip(training.logged_steps(trainer), expected, strict=True):
        assert actual["reward"] == expected_row["reward"]
        assert actual["grad_norm"] == pytest.approx(expected_row["grad_norm"], rel=1e-4)


def test_structured_outputs(loaded, policy, tmp_path) -> None:
    completions_seen: list[str] = []

    def record_completions(completions: list[str], **_: Any) -> list[float]:
        completions_seen.extend(completions)
        return [float(text.endswith("7")) for text in completions]

    trainer = training.make_trainer(
        policy,
        loaded[1],
        tmp_path,
        trainer_arguments={"reward_funcs": record_completions},
        vllm_structured_outputs_regex="[0-9]{2}=(yes|no)[0-9]",
    )
    # Each importance weight is multiplied by the probability mass of the tokens that the grammar
    # allows, because the training pass does not apply the grammar.
    with pytest.warns(ToolkitWarning, match="Remove vllm_structured_outputs_regex"):
        trainer.train()
    assert len(completions_seen) == 16
    assert all(text[:2].isdigit() and text[3:-1] in ("yes", "no") for text in completions_seen), (
        completions_seen
    )
    assert len(set(completions_seen)) > 8
    rows = training.logged_steps(trainer)
    assert all(0 < row["sampling/importance_sampling_ratio/mean"] <= 3 for row in rows)


def test_training_resumes_from_a_checkpoint_with_the_same_result(loaded, tmp_path) -> None:
    """TRL's own options save the checkpoint. Another trainer resumes from it and ends with the same
    adapter.
    """
    grpo = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    full_run = train_run(loaded, tmp_path / "a", **grpo)
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    # The adapter starts from other values, which the checkpoint replaces.
    with training.temporary_adapter(loaded[0], random_state=77) as policy:
        trainer = training.make_trainer(policy, loaded[1], tmp_path / "a", **grpo)
        trainer.train(str(tmp_path / "a" / "checkpoint-2"))
        assert training.adapter_checksum(policy) == full_run[2]


# --- tools

CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}({{ c['function']['name'] }}"
    "{% for k, v in c['function']['arguments'].items() %} {{ k }} {{ v }}{% endfor %})"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
EVERY_TEXT_IS_A_CALL = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<a>",
    "fields": {
        "tool_calls": {
            "open_pattern": "(?P<said>.+)",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "measure", "arguments": {"text": "{said}"}},
            },
        },
        "content": {"content": "text"},
    },
}
"""A response template that reads every completion as a call of ``measure`` with the completion as
its argument. An untrained model calls the tool this way, and its distribution is not changed.
"""


@pytest.mark.parametrize("turns", [1, 2])
def test_tools_through_trls_loop(loaded, policy, tmp_path, turns) -> None:
    from tiny_llama import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = CHAT, EVERY_TEXT_IS_A_CALL
    call_texts, chats = [], []

    def measure(text: str) -> int:
        """The number of characters of a text.

        Args:
            text: any text
        """
        call_texts.append(text)
        return len(text)

    def record_chats(completions: Any, **_: Any) -> list[float]:
        chats.extend(completions)
        return [float(len(messages[-1].get("content") or "x")) for messages in completions]

    trainer = training.make_trainer(
        policy,
        tokenizer,
        tmp_path,
        rows=[{"prompt": [{"role": "user", "content": f"{a}+1="}]} for a in range(8)],
        trainer_arguments={"reward_funcs": record_chats, "tools": [measure]},
        max_tool_calling_iterations=turns,
        max_completion_length=40,
        generation_kwargs={"max_tokens": 6},
    )
    trainer.train()
    rows = training.logged_steps(trainer)
    assert all(row["tools/call_frequency"] == turns for row in rows)
    assert all(row["tools/failure_frequency"] == 0 for row in rows)
    # The tokens of a tool's result are not sampled: they are neither scored nor trained on.
    assert all(row["sampling/logp_gap_max"] < TOLERANCE for row in rows)
    assert len(call_texts) == 16 * turns
    for messages in chats:
        roles = [message["role"] for message in messages]
        assert roles == ["assistant", *["tool", "assistant"] * turns]
        argument = messages[0]["tool_calls"][0]["function"]["arguments"]["text"]
        assert messages[1]["content"] == str(len(argument))


def test_an_unknown_loss_type_is_refused(loaded, policy, tmp_path) -> None:
    trainer = training.make_trainer(policy, loaded[1], tmp_path, loss_type="no_such_loss")
    with pytest.raises(ValueError, match="no_such_loss"):
        trainer.train()
