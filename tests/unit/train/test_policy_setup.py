"""A trainer uses one GPU, the number format of its model, and a float32 adapter."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
import trl
from datasets import Dataset
from trainer_helpers import ROWS, adapter_digest, arguments, make_policy, make_trainer, ones

from toolkit import GRPOConfig
from toolkit.base.errors import ConfigError, ConfigValueError, DefectError, UnsupportedError
from toolkit.policy.base_checksum import base_checksums, changed_tensors
from toolkit.policy.lora import refuse_unsupported_adapter
from toolkit.train.demo import make_model, make_tokenizer
from toolkit.train.trainer import GRPOTrainer

QUICK = {"max_steps": 1, "max_completion_length": 2}


def make_trainer_of(model, config, **more):
    return GRPOTrainer(
        model=model,
        reward_funcs=ones,
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
        **more,
    )


# --- one GPU


@pytest.mark.parametrize("kind", [GRPOConfig, trl.GRPOConfig])
def test_one_process_uses_one_of_several_visible_gpus(tmp_path, kind):
    """transformers sets ``_n_gpu`` to the number of visible GPUs. TRL refuses more than one."""
    config = kind(**{**trl_fields(tmp_path), "fp16": False})
    config._n_gpu = 4
    trainer = make_trainer_of(make_policy(), config)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == config.per_device_train_batch_size
    trainer.train()


def trl_fields(folder):
    config = arguments(folder, **QUICK)
    fields = ("output_dir", "max_steps", "per_device_train_batch_size", "num_generations")
    more_fields = ("max_completion_length", "report_to", "use_cpu", "bf16", "save_strategy")
    return {name: getattr(config, name) for name in (*fields, *more_fields, "disable_tqdm")}


# --- the model's number format


def load_policy(dtype, *, engine=False):
    """Return a policy like one that FastLanguageModel loads, with or without an engine."""
    model = make_policy().to(dtype)
    model.toolkit_full_finetuning = False
    if engine:
        model.toolkit_engine = SimpleNamespace(
            sampler_name="vllm", dtype=dtype, options=SimpleNamespace(max_lora_rank=8)
        )
    return model


def make_config(folder, kind, **more):
    return kind(
        output_dir=str(folder), use_cpu=True, report_to=[], per_device_train_batch_size=8, **more
    )


@pytest.mark.parametrize("kind", [GRPOConfig, trl.GRPOConfig])
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, ("no", False, False)),
        (torch.bfloat16, ("bf16", True, False)),
        (torch.float16, ("no", False, False)),  # autocast to float16 needs a GPU
    ],
)
def test_an_unset_half_precision_format_follows_the_model(tmp_path, kind, engine, dtype, expected):
    trainer = make_trainer_of(load_policy(dtype, engine=engine), make_config(tmp_path, kind))
    args = trainer.args
    assert (args.mixed_precision, bool(args.bf16), bool(args.fp16)) == expected
    assert trainer.accelerator.mixed_precision == expected[0]


def test_a_trainer_without_arguments_follows_the_dtype_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_policy(torch.float32)
    model.config.name_or_path = "some/model"
    config = GRPOTrainer(
        model, ones, train_dataset=Dataset.from_list(ROWS), processing_class=make_tokenizer()
    ).args
    assert config.output_dir == "model-GRPO"
    assert not config.bf16


def test_a_format_that_differs_from_the_engine_is_an_error(tmp_path):
    cases = [
        (GRPOConfig, torch.float32, {"bf16": True}, "bf16=True computes in bfloat16, .* float32"),
        (GRPOConfig, torch.float16, {"bf16": True}, "bf16=True computes in bfloat16, .* float16"),
    ]
    for kind, dtype, fields, words in cases:
        with pytest.raises(ConfigValueError, match=words) as caught:
            make_trainer_of(load_policy(dtype, engine=True), make_config(tmp_path, kind, **fields))
        assert caught.value.where == "grpo.bf16"
        assert "dtype=bfloat16" in str(caught.value.fix)


def test_a_format_that_the_user_set_is_kept(tmp_path):
    """Without an engine, the model itself generates the completions. So mixed precision over
    float32 weights is allowed.
    """
    trainer = make_trainer_of(
        load_policy(torch.float32), make_config(tmp_path, GRPOConfig, bf16=True)
    )
    assert trainer.args.bf16
    off = make_trainer_of(
        load_policy(torch.bfloat16), make_config(tmp_path, GRPOConfig, bf16=False)
    )
    assert not off.args.bf16


def test_the_config_records_the_fields_that_were_passed(tmp_path):
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=None, max_steps=3)
    assert config.toolkit_written == {"output_dir", "use_cpu", "max_steps"}
    assert isinstance(config, trl.GRPOConfig)
    assert "toolkit_written" not in config.to_dict()
    with pytest.raises(TypeError, match="bogus"):
        GRPOConfig(str(tmp_path), bogus=1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server' cannot be used"),
        ({"use_transformers_continuous_batching": True}, "Hugging Face generation is not used"),
    ],
)
def test_another_generation_backend_is_an_error_with_an_engine(tmp_path, fields, words):
    name = list(fields)[-1]
    with pytest.raises(ConfigValueError, match=words) as caught:
        make_trainer_of(
            load_policy(torch.float32, engine=True), make_config(tmp_path, GRPOConfig, **fields)
        )
    assert caught.value.where == f"GRPOConfig.{name}"


# --- a float32 adapter


def adapter_dtypes(trainer):
    return {p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("flag", ["is_loaded_in_4bit", "is_loaded_in_8bit"])
def test_the_adapter_of_a_quantized_model_is_unchanged(tmp_path, flag):
    model = make_policy()
    before = adapter_digest(SimpleNamespace(model=model))
    setattr(model, flag, True)
    trainer = make_trainer_of(model, arguments(tmp_path, beta=0.1, **QUICK))
    assert adapter_dtypes(trainer) == {torch.float32}
    assert adapter_digest(trainer) == before


def test_the_adapter_that_trl_makes_on_a_quantized_model_is_float32(tmp_path):
    model = make_model(7)
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer_of(model, arguments(tmp_path, **QUICK), peft_config=config)
    assert adapter_dtypes(trainer) == {torch.float32}


# --- adapters that the toolkit did not make

LORA = {"r": 4, "target_modules": ["q_proj"]}
UNSUPPORTED_ADAPTERS = {
    "rank": (lambda: peft.LoraConfig(**{**LORA, "r": 16}), "r=16 is above max_lora_rank=8"),
    "olora": (lambda: peft.LoraConfig(**LORA, init_lora_weights="olora"), "rewrites base weights"),
    "pissa": (lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"), "rewrites base weights"),
    "bias": (lambda: peft.LoraConfig(**LORA, bias="all"), "bias='all'"),
    "dora": (lambda: peft.LoraConfig(**LORA, use_dora=True), "use_dora=True"),
    "saved": (lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "modules_to_save"),
    "tokens": (lambda: peft.LoraConfig(**LORA, trainable_token_indices=[3]), "trainable_token"),
    "layers": (lambda: peft.LoraConfig(**LORA, layer_replication=[(0, 1)]), "layer_replication"),
    "alora": (
        lambda: peft.LoraConfig(**LORA, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "alora_invocation",
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]),
        "a ADALORA adapter",
    ),
    "ia3": (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "a IA3"),
    "vera": (lambda: peft.VeraConfig(target_modules=["q_proj"]), "a VERA adapter"),
    "loha": (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "a LOHA adapter"),
    "oft": (lambda: peft.OFTConfig(target_modules=["q_proj"]), "a OFT adapter"),
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "a PROMPT_TUNING adapter"),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2), "a PREFIX_TUNING adapter"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_ADAPTERS)
def test_an_adapter_that_the_engine_does_not_support_is_an_error(name, tmp_path):
    make, words = UNSUPPORTED_ADAPTERS[name]
    model = make_model(7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.toolkit_engine = SimpleNamespace(
        sampler_name="vllm", options=SimpleNamespace(max_lora_rank=8)
    )
    with pytest.raises(ConfigError, match=words) as caught:
        make_trainer_of(model, arguments(tmp_path), peft_config=make())
    assert caught.value.where == "peft_config"
    assert caught.value.fix
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_every_peft_type_except_lora_is_an_error():
    engine = SimpleNamespace(options=SimpleNamespace(max_lora_rank=8))
    for kind in peft.PeftType:
        config = SimpleNamespace(peft_type=kind, to_dict=dict)
        if kind != peft.PeftType.LORA:
            with pytest.raises(UnsupportedError, match=f"a {kind.value} adapter"):
                refuse_unsupported_adapter(None, config, engine, "here")


def test_an_adapter_that_peft_attached_is_also_checked(tmp_path):
    model = make_model(7)
    model.toolkit_engine = SimpleNamespace(
        sampler_name="vllm", options=SimpleNamespace(max_lora_rank=8)
    )
    policy = peft.get_peft_model(model, peft.LoraConfig(**LORA, use_dora=True))
    with pytest.raises(UnsupportedError, match="adapter 'default' of the model: DoRA"):
        make_trainer_of(policy, arguments(tmp_path))


def test_a_model_without_trainable_parameters_is_an_error(tmp_path):
    model = make_model(7).requires_grad_(False)
    with pytest.raises(ConfigValueError, match="no trainable parameter"):
        make_trainer_of(model, arguments(tmp_path))


# --- the base weights never change


def test_a_run_records_that_the_base_did_not_change(tmp_path):
    trainer = make_trainer(tmp_path / "a", **QUICK)
    trainer.train()
    again = make_trainer(tmp_path / "b", **QUICK)
    again.train()
    assert trainer.base_check["unchanged"]
    assert trainer.base_check["tensors"] > 10
    assert again.base_check == trainer.base_check


def test_a_run_that_changes_the_base_weights_fails(tmp_path):
    def write(completions, **_):
        trainer.model.get_base_model().get_submodule("model.norm").weight.data[0] += 1e-3
        return ones(completions)

    trainer = make_trainer(tmp_path, rewards=write, **QUICK)
    with pytest.raises(
        DefectError, match=r"base model changed during the run: .*model\.norm\.weight"
    ):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_checksum_of_a_tensor_detects_a_change_of_any_value(dtype):
    all_values = torch.arange(101).to(dtype)
    for values in (all_values, all_values[1:], all_values[3:50], all_values[::2]):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(values, requires_grad=False)
        before = base_checksums(layer)
        assert changed_tensors(before, base_checksums(layer)) == []
        for index in (0, len(values) - 1):
            values[index] += 1
            assert changed_tensors(before, base_checksums(layer)) == ["weight"]
            values[index] -= 1
