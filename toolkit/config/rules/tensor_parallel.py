"""Rules on tensor_parallel_size, which splits one model over several cards. The rules check its
value, the model, and the settings that cannot be combined with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config import parallel
from toolkit.config.finding import Fix
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_KEY = parallel.TENSOR_PARALLEL_KEY
_SHARE_WEIGHTS = "model.share_weights"
_UNSUPPORTED = "is not supported while one model is split over several cards"
_TWO_CARDS = "model:\n  tensor_parallel_size: 2"


def _may_be_split(run: Run) -> bool:
    """Whether several processes share one model (tensor_parallel_size above 1), or may share one
    model (tensor_parallel_size: auto).
    """
    return bool(run.value(_KEY) == "auto" or run.value(_KEY) > 1)


def _exclusion(run: Run, key: str, message: str, fix: Fix, *notes: str) -> RuleViolation:
    """The violation at ``key`` for a value that cannot be used while processes share one model."""
    return RuleViolation(
        key,
        message,
        notes=(*notes, run.describe(_KEY)),
        fixes=(fix, run.set_fix(_KEY, 1)),
        related=(_KEY,),
    )


@rule("LOAD006", _KEY, example=f"{_TWO_CARDS[:-1]}3", fix="tensor_parallel_size: 1")
def size_divides_heads_and_world(run: Run) -> Iterator[RuleViolation]:
    """tensor_parallel_size divides the model's heads, its intermediate size and the world size.

    A group of tensor_parallel_size processes shares one model. Each process has one card, and an
    attention head is never split between two cards. If tensor_parallel_size is a multiple of
    the number of KV heads, the group may have more cards than the model has KV heads. Then several
    cards have a copy of the same KV head. The model is checked if it is on this machine.
    --world-size sets the number of processes for the check.
    """
    size = run.value(_KEY)
    if size in (1, "auto"):
        return
    config = run.model.config if run.model is not None else None
    smaller_sizes = [
        candidate
        for candidate in parallel.possible_sizes(config, run.world_size)
        if candidate < size
    ]
    fixes = (run.set_fix(_KEY, smaller_sizes[-1] if smaller_sizes else 1),)
    problem = parallel.shape_problem(config, size) if config is not None else None
    if problem is not None:
        yield RuleViolation(
            _KEY, problem, notes=(run.model.source,) if run.model else (), fixes=fixes
        )
    elif run.world_size % size:
        yield RuleViolation(
            _KEY,
            f"the world size {run.world_size} is not a multiple of tensor_parallel_size {size}",
            notes=("the world size is torchrun's number of processes; --world-size sets it here",),
            fixes=fixes,
        )


@rule(
    "TP001",
    f"{_KEY} {_SHARE_WEIGHTS}",
    example=f"{_TWO_CARDS}\n  share_weights: false",
    fix="share_weights: true",
)
def split_weights_are_shared(run: Run) -> Iterator[RuleViolation]:
    """tensor_parallel_size above 1 needs share_weights: true.

    The trainer computes with the part of the model that the engine in the same process has loaded.
    A second, complete copy in each process would take the memory that splitting saves.
    """
    if _may_be_split(run) and not run.value(_SHARE_WEIGHTS) and run.engine != "transformers":
        yield RuleViolation(
            _KEY,
            "a model cannot be split over GPUs if the trainer has its own copy of the weights",
            notes=(run.describe(_SHARE_WEIGHTS),),
            fixes=(run.set_fix(_SHARE_WEIGHTS, True), run.set_fix(_KEY, 1)),
            related=(_SHARE_WEIGHTS,),
        )


@rule(
    "TP003",
    f"{_KEY} model.model_name model.load_in_4bit",
    example=f"{_TWO_CARDS}\n  model_name: Qwen/Qwen3-30B-A3B",
    fix="tensor_parallel_size: 1",
)
def model_can_be_split(run: Run) -> Iterator[RuleViolation]:
    """tensor_parallel_size above 1 needs a model that the trainer can compute in parts.

    The trainer supports dense decoders with separate projections. It does not support a mixture of
    experts, fused projections (Phi-3), models that vLLM runs through its Transformers backend, or
    packed 4-bit weights. The model is checked if it is on this machine.
    """
    if run.value(_KEY) in (1, "auto") or run.engine == "transformers":
        return
    if run.get("model.load_in_4bit"):
        yield RuleViolation(
            _KEY,
            "packed 4-bit weights cannot be split over several cards",
            notes=(run.describe("model.load_in_4bit"),),
            fixes=(run.set_fix("model.load_in_4bit", False), run.set_fix(_KEY, 1)),
            related=("model.load_in_4bit",),
        )
        return
    problem = parallel.model_problem(run.model.config) if run.model is not None else None
    if problem is not None and run.model is not None:
        yield RuleViolation(
            _KEY,
            problem,
            notes=(run.model.source,),
            fixes=(run.set_fix(_KEY, 1),),
            related=("model.model_name",),
        )


_NEUTRAL = {
    "grpo.top_p": (1.0, None),
    "grpo.top_k": (0, -1, None),
    "grpo.min_p": (0.0, None),
    "grpo.repetition_penalty": (1.0, None),
}
_PENALTIES = ("presence_penalty", "frequency_penalty")


@rule(
    "TP004",
    f"{_KEY} {' '.join(_NEUTRAL)} grpo.generation_kwargs",
    example=f"{_TWO_CARDS}\ngrpo:\n  top_p: 0.9",
    fix="top_p: 1.0",
)
def sampling_needs_no_full_logits(run: Run) -> Iterator[RuleViolation]:
    """With tensor_parallel_size above 1, sampling uses no top_p, top_k, min_p or penalties.

    Training applies these settings to its own logits. The settings depend on the logits of all
    tokens, but each card computes the logits of only a part of the vocabulary.
    """
    if not _may_be_split(run) or run.engine == "transformers":
        return
    for key, neutral in _NEUTRAL.items():
        if run.get(key) not in neutral:
            message = f"{run.get(key)} {_UNSUPPORTED}"
            yield _exclusion(run, key, message, run.set_fix(key, neutral[0]))
    for name, value in run.mapping("grpo.generation_kwargs").items():
        if name in _PENALTIES and value:
            message = f"{name} {value} {_UNSUPPORTED}"
            yield _exclusion(run, "grpo.generation_kwargs", message, Fix(f"remove {name}"))


@rule(
    "TP005",
    f"{_KEY} lora.lora_dropout lora.init_lora_weights",
    example=f"{_TWO_CARDS}\nlora:\n  lora_dropout: 0.05",
    fix="lora_dropout: 0.0",
)
def adapter_can_be_split(run: Run) -> Iterator[RuleViolation]:
    """With tensor_parallel_size above 1, the adapter has no dropout, and its initialization does
    not depend on the base weights.

    With dropout, each process would draw its own mask, so the result would differ from that of a
    single process. Each process has only a part of the base weights, so an initialization that is
    computed from the base weights would differ too.
    """
    if not _may_be_split(run) or run.engine == "transformers":
        return
    if run.get("lora.lora_dropout"):
        message = f"{run.get('lora.lora_dropout')} {_UNSUPPORTED}"
        yield _exclusion(run, "lora.lora_dropout", message, run.set_fix("lora.lora_dropout", 0.0))
    init = run.get("lora.init_lora_weights")
    if init not in parallel.SLICED_INITS:
        message = f"{init} needs the complete weights, but each card has only a part of them"
        fix = run.set_fix("lora.init_lora_weights", True)
        yield _exclusion(run, "lora.init_lora_weights", message, fix)


@rule(
    "TP006",
    f"{_KEY} grpo.optim",
    example=f"{_TWO_CARDS}\ngrpo:\n  optim: adafactor",
    fix="optim: adamw_torch_fused",
)
def optimizer_can_be_split(run: Run) -> Iterator[RuleViolation]:
    """tensor_parallel_size above 1 needs an optimizer that updates each value independently.

    Each process updates only a part of the adapter. Some optimizers use whole rows or columns
    (adafactor), blocks of values (8-bit optimizers) or the norm of a tensor. The step of such an
    optimizer would differ from its step in a single process.
    """
    if not _may_be_split(run) or run.engine == "transformers":
        return
    optim = run.get("grpo.optim")
    if optim is not None and optim not in parallel.ELEMENTWISE:
        supported_note = f"supported are {', '.join(sorted(parallel.ELEMENTWISE))}"
        fix = run.set_fix("grpo.optim", "adamw_torch_fused")
        yield _exclusion(run, "grpo.optim", f"{optim} {_UNSUPPORTED}", fix, supported_note)
