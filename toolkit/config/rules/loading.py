"""Rules on how the model is loaded, and on what the engine requires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.supported_features import ENGINE_EXCLUDES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_FORMATS = ("load_in_4bit", "load_in_8bit", "load_in_16bit")
_FAST = "model.fast_inference"
_ENGINE = "runtime.engine"
_TOKENS = "model.max_num_batched_tokens"
_SEQUENCES = "model.max_num_seqs"
_CHUNKED = "model.enable_chunked_prefill"
_SHARE = "model.gpu_memory_utilization"


@rule(
    "LOAD001",
    " ".join(f"model.{name}" for name in _FORMATS),
    example="model:\n  load_in_4bit: true\n  load_in_8bit: true",
    fix="set load_in_8bit: false",
)
def one_format(run: Run) -> Iterator[RuleViolation]:
    """At most one of load_in_4bit, load_in_8bit and load_in_16bit is true.

    Weights can be stored in only one format.
    """
    chosen = [name for name in _FORMATS if run.get(f"model.{name}")]
    if len(chosen) > 1:
        yield RuleViolation(
            f"model.{chosen[1]}",
            f"weights can be stored in only one format, but {' and '.join(chosen)} are true",
            notes=("; ".join(run.describe(f"model.{name}") for name in chosen),),
            fixes=tuple(run.set_fix(f"model.{name}", False) for name in chosen[1:]),
            related=tuple(f"model.{name}" for name in chosen),
        )


@rule(
    "LOAD003",
    f"{_FAST} model.trust_remote_code model.full_finetuning model.load_in_8bit",
    example="model:\n  fast_inference: true\n  full_finetuning: true",
    fix="fast_inference: false",
)
def engine_conditions(run: Run) -> Iterator[RuleViolation]:
    """fast_inference excludes trust_remote_code, full_finetuning and load_in_8bit.

    The engine runs its own model code, not the checkpoint's. Engine and trainer share the base
    weights, so training must not change them. The engine has no 8-bit bitsandbytes kernels for
    LoRA.
    """
    if run.engine == "transformers":
        return
    for name, why in ENGINE_EXCLUDES.items():
        if run.get(f"model.{name}"):
            key = _FAST if run.is_set(_FAST) and run.get(_FAST) is True else _ENGINE
            off = False if key == _FAST else "transformers"
            yield RuleViolation(
                f"model.{name}",
                f"cannot be used with the vLLM engine: {why}",
                notes=(run.describe(key),),
                fixes=(run.set_fix(f"model.{name}", False), run.set_fix(key, off)),
                related=(key,),
                severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
            )


@rule(
    "LOAD007",
    f"{_TOKENS} {_SEQUENCES} {_CHUNKED} model.max_seq_length",
    example="model:\n  max_num_batched_tokens: 128\n  max_num_seqs: 256",
    fix="max_num_batched_tokens: 256",
)
def tokens_for_every_sequence(run: Run) -> Iterator[RuleViolation]:
    """max_num_batched_tokens is at least max_num_seqs. Without chunked prefill,
    max_num_batched_tokens is also at least max_seq_length.

    A decoding step processes one token of each sequence. Without chunked prefill a whole prompt
    must fit into one step.
    """
    tokens, sequences = run.value(_TOKENS), run.value(_SEQUENCES)
    if tokens == "auto":
        return
    if sequences != "auto" and tokens < sequences:
        yield RuleViolation(
            _TOKENS,
            f"{tokens} tokens per step are too few for {sequences} sequences at a time",
            notes=(f"{run.describe(_TOKENS)} < {run.describe(_SEQUENCES)}",),
            fixes=(run.set_fix(_TOKENS, sequences), run.set_fix(_SEQUENCES, tokens)),
            related=(_SEQUENCES,),
        )
    length = run.value("model.max_seq_length")
    if not run.value(_CHUNKED) and tokens < length:
        yield RuleViolation(
            _TOKENS,
            f"{tokens} tokens per step are fewer than max_seq_length {length}",
            notes=(f"{run.describe(_CHUNKED)}: a whole prompt must fit into one step",),
            fixes=(run.set_fix(_TOKENS, length), run.set_fix(_CHUNKED, True)),
            related=(_CHUNKED, "model.max_seq_length"),
        )


@rule(
    "LOAD008",
    _SHARE,
    example="model:\n  gpu_memory_utilization: 1.2",
    fix="gpu_memory_utilization: auto",
)
def a_part_of_the_card(run: Run) -> Iterator[RuleViolation]:
    """gpu_memory_utilization is above 0 and below 1, and in the range that the sizer finds for the
    card.

    gpu_memory_utilization is the fraction of the card's memory that vLLM may use. The sizer's range
    is checked with --gpu NAME when the model is on this machine. `envcheck size` shows the whole
    memory budget.
    """
    node = run.node(_SHARE)
    if node is None or type(node.value) not in (int, float) or 0 < node.value < 1:
        return
    if node.value != node.value:
        return
    likely = round(node.value / 100, 4) if 10 <= node.value < 100 else "auto"  # 90: a percentage
    yield RuleViolation(
        _SHARE,
        f"{node.value} is out of range: it must be a fraction above 0 and below 1",
        fixes=(run.set_fix(_SHARE, likely),),
    )


@rule(
    "LOAD010",
    f"{_ENGINE} {_FAST}",
    example="model:\n  fast_inference: false\nruntime:\n  engine: vllm",
    fix="engine: transformers",
)
def engine_and_fast_inference_agree(run: Run) -> Iterator[RuleViolation]:
    """runtime.engine and model.fast_inference do not contradict each other.

    Both keys choose the engine. runtime.engine chooses it by name, and fast_inference: true chooses
    the vLLM engine.
    """
    engine, fast = run.value(_ENGINE), run.value(_FAST)
    wanted = {("vllm", False): True, ("transformers", True): False}.get((engine, fast))
    if wanted is not None:
        yield RuleViolation(
            _ENGINE,
            f"{engine} contradicts fast_inference {str(fast).lower()}",
            notes=(run.describe(_FAST),),
            fixes=(run.set_fix(_FAST, wanted), run.set_fix(_ENGINE, "auto")),
            related=(_FAST,),
        )


@rule(
    "LOAD040",
    "model.dequantized_rollouts model.load_in_4bit model.tensor_parallel_size",
    example="model:\n  dequantized_rollouts: true  # with load_in_4bit: false, the default",
    fix="dequantized_rollouts: auto",
    severity=Severity.WARNING,
)
def something_to_dequantize(run: Run) -> Iterator[RuleViolation]:
    """dequantized_rollouts: true needs base weights in 4 bits and an engine on one GPU.

    The key replaces 4-bit weights by 16-bit copies while the engine samples. Weights that are
    stored in 16 bits need no copy. An engine on several GPUs has worker processes, in which the
    toolkit cannot replace weights.
    """
    key = "model.dequantized_rollouts"
    written = run.value(key)
    if run.engine == "transformers" or written in ("auto", False):
        return
    for other, wanted in (("model.load_in_4bit", True), ("model.tensor_parallel_size", 1)):
        if run.value(other) != wanted:
            yield RuleViolation(
                key,
                "has no effect: it needs 4-bit weights and an engine on one GPU",
                notes=(run.describe(other),),
                fixes=(run.set_fix(key, "auto"),),
                related=(other,),
            )
            return
