"""Rules on the run folder, on resuming, and on the number format of trainer and engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from toolkit.config.document import Node
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.run_paths import LOCK_FILE, path_exists, resolve_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.rules.run import Run

_RESUME = "runtime.resume"
_OUTPUT = "runtime.output_dir"


@rule(
    "RUN001",
    f"{_OUTPUT} {_RESUME}",
    example="runtime:\n  output_dir: runs/old  # not empty\n  resume: never",
    fix="set resume: auto, or use another output_dir",
)
def output_is_empty(run: Run) -> Iterator[RuleViolation]:
    """With resume: never, output_dir is empty.

    A new run would overwrite the files of the old run. With resume: auto the old run continues from
    its last checkpoint.
    """
    if run.value(_RESUME) != "never":
        return
    folder = _output_folder(run)
    if _is_occupied(folder):
        yield RuleViolation(
            _OUTPUT,
            f"{folder} is not empty, but a run with resume: never needs an empty folder",
            notes=(run.describe(_RESUME),),
            fixes=(run.set_fix(_RESUME, "auto"),),
            related=(_RESUME,),
        )


@rule(
    "RUN002",
    f"{_RESUME} {_OUTPUT}",
    example="runtime:\n  output_dir: runs/new  # empty\n  resume: must",
    fix="resume: auto",
)
def checkpoint_to_resume_exists(run: Run) -> Iterator[RuleViolation]:
    """With resume: must, output_dir contains a checkpoint. With resume: FOLDER, FOLDER is the
    folder of a checkpoint.
    """
    resume = run.value(_RESUME)
    if resume in ("auto", "never"):
        return
    if resume == "must":
        folder = _output_folder(run)
        if not any(name.startswith("checkpoint-") for name in _entry_names(folder)):
            yield RuleViolation(
                _RESUME,
                f"there is no checkpoint in {folder} to resume from",
                notes=(run.describe(_OUTPUT),),
                fixes=(run.set_fix(_RESUME, "auto"),),
            )
        return
    node = run.node(_RESUME)
    assert isinstance(node, Node)
    path = resolve_path(resume, node)
    if not path.is_dir():
        yield RuleViolation(
            _RESUME,
            f"{resume} must be auto, never, must, or the folder of a checkpoint",
            fixes=(run.set_fix(_RESUME, "auto"),),
        )


def _output_folder(run: Run) -> Path:
    text, node = str(run.value(_OUTPUT)), run.node(_OUTPUT)
    return resolve_path(text, node if node is not None else run.document.root)


def _is_occupied(folder: Path) -> bool:
    """Whether ``folder`` is a file, or a folder that contains more than the lock file. `toolkit
    train` creates the lock file before it validates the run file.
    """
    return path_exists(folder) and (
        not folder.is_dir() or bool(set(_entry_names(folder)) - {LOCK_FILE})
    )


def _entry_names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


@rule(
    "GRPO065",
    "runtime.pack_tokens runtime.padding_free",
    example="runtime:\n  pack_tokens: 32768\n  padding_free: false",
    fix="padding_free: true",
)
def pack_tokens_need_padding_free(run: Run) -> Iterator[RuleViolation]:
    """pack_tokens needs padding_free.

    pack_tokens limits the number of tokens in one forward and backward pass. Only a batch without
    padding is split by tokens. With padding_free: false, a batch is split into parts of
    per_device_train_batch_size rows.
    """
    if run.value("runtime.pack_tokens") == "auto" or run.value("runtime.padding_free"):
        return
    yield RuleViolation(
        "runtime.pack_tokens",
        "has no effect on padded batches, which are split by rows",
        notes=(run.describe("runtime.padding_free"),),
        fixes=(run.set_fix("runtime.pack_tokens", "auto"),),
        related=("runtime.padding_free",),
    )


@rule(
    "GRPO066",
    "runtime.fused_kernels grpo.use_liger_kernel",
    example="runtime:\n  fused_kernels: true\ngrpo:\n  use_liger_kernel: true",
    fix="use_liger_kernel: false",
)
def fused_kernels_exclude_liger(run: Run) -> Iterator[RuleViolation]:
    """fused_kernels: true and use_liger_kernel: true exclude each other.

    Both keys replace layers of the model by kernels of the package liger-kernel. fused_kernels is
    the toolkit's key, and compares each kernel with the layer that the kernel replaces.
    use_liger_kernel is TRL's key. With fused_kernels: auto and use_liger_kernel: true, only
    use_liger_kernel has an effect.
    """
    if run.value("runtime.fused_kernels") is True and run.value("grpo.use_liger_kernel"):
        yield RuleViolation(
            "grpo.use_liger_kernel",
            "cannot be true while fused_kernels is true",
            notes=(run.describe("runtime.fused_kernels"),),
            fixes=(run.set_fix("grpo.use_liger_kernel", False),),
            related=("runtime.fused_kernels",),
        )


TRAINER_DTYPES = {"grpo.bf16": "bfloat16", "grpo.fp16": "float16"}


@rule(
    "RUN020",
    "grpo.bf16 grpo.fp16 model.dtype runtime.engine",
    example="model: {dtype: float32}\ngrpo: {bf16: true}\nruntime: {engine: vllm}",
    fix="bf16: false",
)
def trainer_and_engine_share_dtype(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, the trainer computes in the format that the engine samples in.

    With a float32 engine and a bfloat16 trainer, the run samples a slightly different policy than
    it trains. The log-probabilities of the two differ by 3e-3 to 6e-3 nats per token. If
    engine and trainer both use float32, the difference is 1e-6. Without the vLLM engine, the
    trained model itself samples, so there is only one format. If engine and trainer would use two
    different 16-bit formats, another rule (GRPO023) reports this.
    """
    if run.engine != "vllm" or run.get("model.dtype") != "float32":
        return
    for key, dtype in TRAINER_DTYPES.items():
        if run.get(key):
            yield RuleViolation(
                key,
                f"the trainer would compute in {dtype}, but the engine samples in float32",
                notes=(run.describe("model.dtype"), run.describe("runtime.engine")),
                fixes=(run.set_fix(key, False), run.set_fix("model.dtype", dtype)),
                related=("model.dtype",),
            )
