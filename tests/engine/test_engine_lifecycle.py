"""Starting and closing the engine: closing frees all resources, a second engine works, and errors
say how to fix the problem.
"""

from __future__ import annotations

import gc
import json
import os
import re
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import engine_checkpoints
import psutil
import pytest
import torch
from conftest import small_options
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from toolkit.base.errors import ConfigError, InputError, ToolkitError, UnsupportedError
from toolkit.base.mapped_files import mapped_weight_files
from toolkit.engine.open_engine import open_engine
from toolkit.engine.rollout_request import Sampling
from toolkit.policy.shared_weights import shared_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from toolkit.engine.engine import Engine

pytestmark = [pytest.mark.engine, pytest.mark.thorough]


def test_no_weight_stays_mapped_from_the_file(
    llama_folder: Path, open_small: Callable[..., Engine]
) -> None:
    """A checkpoint file that is truncated during the run must not end the run."""
    with open_small(llama_folder):
        assert mapped_weight_files() == []


def test_vllm_inspects_the_model_in_this_process(
    llama_folder: Path,
    open_small: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second process would import torch and vLLM again. vLLM starts one for a class that is not
    registered and not in its cache folder.
    """
    from vllm.model_executor.models import registry

    def refuse(*_: object) -> None:
        raise AssertionError("vLLM has started a second process")

    monkeypatch.setattr(registry, "_run_in_subprocess", refuse)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    name = "LlamaForCausalLM"
    module = "vllm.model_executor.models.llama"
    registry.ModelRegistry.register_model(name, f"{module}:{name}")
    with pytest.raises(AssertionError, match="second process"):
        registry.ModelRegistry.models[name].inspect_model_cls()
    with open_small(llama_folder) as engine:
        assert type(engine.module).__name__ == name


def test_the_warm_up_samples_with_the_given_options_only_during_the_start() -> None:
    from vllm import SamplingParams

    from toolkit.engine.vllm_internals import sampling_of_warm_up

    every_option = SamplingParams.for_sampler_warmup()
    given = SamplingParams(max_tokens=2, temperature=1.0)
    with suppress(RuntimeError), sampling_of_warm_up(given):
        first, second = SamplingParams.for_sampler_warmup(), SamplingParams.for_sampler_warmup()
        assert first == second == given
        assert first is not second
        raise RuntimeError("no memory")  # a start that fails
    assert SamplingParams.for_sampler_warmup() == every_option != given


def process_resources() -> tuple[set[str], int, int]:
    """Thread names, number of child processes and number of listening sockets of this process."""
    process = psutil.Process()
    threads = {thread.name for thread in threading.enumerate()}
    listening = [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    return threads, len(process.children(recursive=True)), len(listening)


def test_close_frees_everything_and_a_second_engine_works(
    llama_folder: Path, open_small: Callable[..., Engine]
) -> None:
    sampling = Sampling(n=2, max_tokens=8)
    with open_small(llama_folder) as engine:  # creates all that a first engine leaves behind
        first = engine.generate([[5, 6, 7]], sampling, seed=1)
    gc.collect()
    threads, children, sockets = process_resources()
    torch.manual_seed(77)  # differs from the state that vLLM's own seeding leaves
    rng, count = torch.get_rng_state(), torch.get_num_threads()
    engine = open_small(llama_folder)
    assert torch.equal(rng, torch.get_rng_state())
    torch.set_num_threads(count + 1)
    assert torch.get_num_threads() == count + 1
    torch.set_num_threads(count)
    model = shared_model(engine)
    again = engine.generate([[5, 6, 7]], sampling, seed=1)
    module = weakref.ref(engine.module)
    llm = weakref.ref(engine.llm)
    weight = weakref.ref(model.get_input_embeddings().weight)
    engine.close()
    engine.close()
    del model
    gc.collect()
    assert again == first
    assert module() is None, "the engine's model is still alive"
    assert llm() is None, "the engine is still alive"
    assert weight() is None
    after_threads, after_children, after_sockets = process_resources()
    assert after_threads <= threads
    assert after_children <= children
    assert after_sockets <= sockets
    assert not torch.distributed.is_initialized()
    for use in (
        lambda: engine.llm,
        lambda: engine.module,
        lambda: engine.generate([[5]], Sampling(), seed=1),
        lambda: engine.vllm_generate([{"prompt_token_ids": [5]}], None),
        lambda: engine.publish(None),
        lambda: engine.lora_request(),
        lambda: engine.load_lora("somewhere"),
    ):
        with pytest.raises(ConfigError, match="closed"):
            use()


@pytest.mark.slow
def test_one_engine_at_a_time(llama_folder: Path, open_small: Callable[..., Engine]) -> None:
    """A notebook's loading cell may run twice. If the first engine is still referenced, the error
    names its model. If nothing references the first engine, the second one opens.
    """
    with open_small(llama_folder) as first:
        with pytest.raises(ConfigError, match="open in this process") as caught:
            open_small(llama_folder)
        assert str(llama_folder) in str(caught.value)
        assert "toolkit_engine.close()" in str(caught.value.fix)
        assert first.generate([[5]], Sampling(max_tokens=2), seed=1).completion_ids
    lost = open_small(llama_folder)
    lost.itself = lost  # type: ignore[attr-defined]  # only the garbage collector frees a cycle
    del lost
    with open_small(llama_folder) as engine:
        assert engine.generate([[5]], Sampling(max_tokens=2), seed=1).completion_ids


def test_a_process_group_of_the_trainer_survives_the_engine(
    llama_folder: Path, open_small: Callable[..., Engine], tmp_path: Path
) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        with open_small(llama_folder) as engine:
            assert engine.generate([[5]], Sampling(max_tokens=2), seed=1).completion_ids
        assert torch.distributed.is_initialized()
        torch.distributed.all_reduce(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()
    with open_small(llama_folder) as engine:
        assert engine.generate([[5]], Sampling(max_tokens=2), seed=1).completion_ids


def test_after_a_failed_start_another_engine_works(
    llama_folder: Path, open_small: Callable[..., Engine]
) -> None:
    with pytest.raises(ToolkitError) as caught:
        open_small(llama_folder, max_model_len=4096)  # beyond the model's 256 positions
    assert caught.value.exit_code == 1
    assert "max_model_len (4096)" in str(caught.value)
    assert caught.value.fix
    with pytest.raises(ToolkitError) as caught:
        open_small(llama_folder, kv_cache_bytes=1 << 14)
    assert caught.value.exit_code == 1
    assert "check" in str(caught.value.where)
    with open_small(llama_folder) as engine:
        assert engine.generate([[5]], Sampling(max_tokens=1), seed=1).completion_ids


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


BAD_CHECKPOINTS = {
    "missing": "lacks tensors of the model .*model.layers.1.mlp.down_proj.weight",
    "missing expert": "lacks tensors of the model .*model.layers.1.mlp.experts.2.up_proj.weight$",
    "extra": "no module or parameter named 'layers.1.self_attn.q_norm'",
    "shape": "Attempted to load weight",
    "NaN": "logits are not finite. Either its weights contain NaN or infinity, or values exceed",
    "cut short": "did not start: The model's weights are missing, truncated",
}


@pytest.mark.parametrize("defect", BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_match_is_refused(
    defect: str, tmp_path: Path, open_small: Callable[..., Engine]
) -> None:
    family = "qwen3_moe" if defect == "missing expert" else "llama"
    folder = engine_checkpoints.make_checkpoint(tmp_path, family)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if defect == "missing":
            del tensors["model.layers.1.mlp.down_proj.weight"]
        elif defect == "missing expert":
            del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        elif defect == "extra":
            tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(32)
        elif defect == "NaN":
            tensors["model.norm.weight"][0] = torch.nan
        else:
            tensors["model.norm.weight"] = torch.ones(64)

    rewrite_tensors(folder, change)
    if defect == "cut short":
        os.truncate(folder / "model.safetensors", 50_000)
    with pytest.raises(ToolkitError) as caught, open_small(folder) as engine:
        shared_model(engine)
    assert re.search(BAD_CHECKPOINTS[defect], caught.value.message), caught.value
    assert caught.value.exit_code == 1
    assert "checkpoint" in str(caught.value.fix)
    assert gc.get_freeze_count() == 0, "garbage of this process would never be collected"


def test_engine_and_model_that_differ_are_refused_by_the_spot_check(
    tmp_path: Path, open_small: Callable[..., Engine]
) -> None:
    folder = engine_checkpoints.make_checkpoint(tmp_path, "llama")
    with open_small(folder) as engine:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
        (folder / "config.json").write_text(json.dumps(config))  # after the engine was opened
        with pytest.raises(UnsupportedError, match="differ by"):
            shared_model(engine)


def test_a_separate_model_needs_no_shared_weights(
    llama_folder: Path, open_small: Callable[..., Engine]
) -> None:
    with open_small(llama_folder, share_weights=False) as engine:
        assert engine.generate([[5]], Sampling(max_tokens=1), seed=1).completion_ids
        with pytest.raises(UnsupportedError, match="share_weights"):
            shared_model(engine)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "stored in FP8"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
    ],
)
def test_unsupported_models_are_refused_before_loading(
    change: dict, text: str, tmp_path: Path, open_small: Callable[..., Engine]
) -> None:
    folder = engine_checkpoints.make_checkpoint(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedError, match=text) as caught:
        open_small(folder)
    assert caught.value.fix


def test_4bit_needs_a_gpu(llama_folder: Path, open_small: Callable[..., Engine]) -> None:
    with pytest.raises(UnsupportedError, match="CUDA"):
        open_small(llama_folder, load_in_4bit=True)


def test_a_missing_model_is_refused(tmp_path: Path, open_small: Callable[..., Engine]) -> None:
    with pytest.raises(InputError, match="the model config cannot be read"):
        open_small(tmp_path / "nothing")


@pytest.mark.slow
def test_experts_on_a_cpu_are_shared_only_with_lora_and_get_no_adapter(tmp_path: Path) -> None:
    """vLLM's own CPU kernel repacks experts, so they can be shared only if LoRA is enabled. An
    adapter on experts is refused; test_engine_families.py tests the supported adapters.
    """
    folder = engine_checkpoints.make_checkpoint(tmp_path, "qwen3_moe")
    with open_engine(small_options(folder, enable_lora=False)) as engine:
        assert engine.generate([[5]], Sampling(max_tokens=2), seed=1).completion_ids
        with pytest.raises(UnsupportedError, match=r"rewritten .*w13_weight"):
            shared_model(engine)
    with open_engine(small_options(folder)) as engine:
        model = shared_model(engine)
        on_experts = LoraConfig(
            r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
        )
        policy = get_peft_model(model, on_experts)
        with pytest.raises(UnsupportedError, match="a weight of the experts") as caught:
            engine.publish(policy)
        assert "set `target_modules` to the attention projections" in str(caught.value.fix)


def test_a_head_size_without_a_cpu_kernel_is_refused(tmp_path: Path) -> None:
    """The error comes before vLLM starts, and its exit code is not that of a bad node."""
    engine_checkpoints.make_checkpoint(tmp_path, "llama", head_dim=16)
    with pytest.raises(UnsupportedError, match="heads have size 16") as caught:
        open_engine(small_options(tmp_path))
    assert caught.value.exit_code == 1
    assert "runtime.engine: transformers" in str(caught.value.fix)
