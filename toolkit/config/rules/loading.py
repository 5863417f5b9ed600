"""Rules on how the model is loaded, and on what the engine requires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.supported_features import FLAGS_WITHOUT_ENGINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_FORMATS = ("load_in_4bit", "load_in_8bit", "load_in_16bit")
_FAST_INFERENCE = "model.fast_inference"
_ENGINE = "runtime.engine"
_BATCHED_TOKENS = "model.max_num_batched_tokens"
_SEQUENCES = "model.max_num_seqs"
_CHUNKED = "model.enable_chunked_prefill"
_MEMORY_UTILIZATION = "model.gpu_memory_utilization"


@rule(
    "LOAD001",
    " ".join(f"model.{name}" for name in _FORMATS),
    example="model:\n  load_in_4bit: true\n  load_in_8bit: true",
    fix="set load_in_8bit: false",
)
def one_weight_format(run: Run) -> Iterator[RuleViolation]:
    """At most one of load_in_4bit, load_in_8bit and load_in_16bit is true.

    Weights can be stored in only one format.
    """
    formats = [name for name in _FORMATS if run.get(f"model.{name}")]
    if len(formats) > 1:
        yield RuleViolation(
            f"model.{formats[1]}",
            f"weights can be stored in only one format, but {' and '.join(formats)} are true",
            notes=("; ".join(run.describe(f"model.{name}") for name in formats),),
            fixes=tuple(run.set_fix(f"model.{name}", False) for name in formats[1:]),
            related=tuple(f"model.{name}" for name in formats),
        )


@rule(
    "LOAD003",
    f"{_FAST_INFERENCE} model.trust_remote_code model.full_finetuning model.load_in_8bit",
    example="model:\n  fast_inference: true\n  full_finetuning: true",
    fix="fast_inference: false",
)
def engine_supports_loading(run: Run) -> Iterator[RuleViolation]:
    """fast_inference excludes trust_remote_code, full_finetuning and load_in_8bit.

    The engine runs its own model code, not the checkpoint's. Engine and trainer share the base
    weights, so training must not change them. The engine has no 8-bit bitsandbytes kernels for
    LoRA.
    """
    if run.engine == "transformers":
        return
    for name, reason in FLAGS_WITHOUT_ENGINE.items():
        if run.get(f"model.{name}"):
            key = (
                _FAST_INFERENCE
                if run.is_set(_FAST_INFERENCE) and run.get(_FAST_INFERENCE) is True
                else _ENGINE
            )
            other_value = False if key == _FAST_INFERENCE else "transformers"
            yield RuleViolation(
                f"model.{name}",
                f"cannot be used with the vLLM engine: {reason}",
                notes=(run.describe(key),),
                fixes=(run.set_fix(f"model.{name}", False), run.set_fix(key, other_value)),
                related=(key,),
                severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
            )


@rule(
    "LOAD007",
    f"{_BATCHED_TOKENS} {_SEQUENCES} {_CHUNKED} model.max_seq_length",
    example="model:\n  max_num_batched_tokens: 128\n  max_num_seqs: 256",
    fix="max_num_batched_tokens: 256",
)
def tokens_for_every_sequence(run: Run) -> Iterator[RuleViolation]:
    """max_num_batched_tokens is at least max_num_seqs. Without chunked prefill,
    max_num_batched_tokens is also at least max_seq_length.

    A decoding step processes one token of each sequence. Without chunked prefill a whole prompt
    must fit into one step.
    """
    tokens, sequences = run.value(_BATCHED_TOKENS), run.value(_SEQUENCES)
    if tokens == "auto":
        return
    if sequences != "auto" and tokens < sequences:
        yield RuleViolation(
            _BATCHED_TOKENS,
            f"{tokens} tokens per step are too few for {sequences} sequences at a time",
            notes=(f"{run.describe(_BATCHED_TOKENS)} < {run.describe(_SEQUENCES)}",),
            fixes=(run.set_fix(_BATCHED_TOKENS, sequences), run.set_fix(_SEQUENCES, tokens)),
            related=(_SEQUENCES,),
        )
    length = run.value("model.max_seq_length")
    if not run.value(_CHUNKED) and tokens < length:
        yield RuleViolation(
            _BATCHED_TOKENS,
            f"{tokens} tokens per step are fewer than max_seq_length {length}",
            notes=(f"{run.describe(_CHUNKED)}: a whole prompt must fit into one step",),
            fixes=(run.set_fix(_BATCHED_TOKENS, length), run.set_fix(_CHUNKED, True)),
            related=(_CHUNKED, "model.max_seq_length"),
        )


@rule(
    "LOAD008",
    _MEMORY_UTILIZATION,
    example="model:\n  gpu_memory_utilization: 1.2",
    fix="gpu_memory_utilization: auto",
)
def memory_utilization_is_fraction(run: Run) -> Iterator[RuleViolation]:
    """gpu_memory_utilization is above 0 and below 1, and in the range that the sizer finds for the
    card.

    gpu_memory_utilization is the fraction of the card's memory that vLLM may use. The sizer's range
    is checked with --gpu NAME when the model is on this machine. `envcheck size` shows the whole
    memory budget.
    """
    node = run.node(_MEMORY_UTILIZATION)
    if node is None or type(node.value) not in (int, float) or 0 < node.value < 1:
        return
    if node.value != node.value:
        return
    suggestion = (
        round(node.value / 100, 4) if 10 <= node.value < 100 else "auto"
    )  # 90: a percentage
    yield RuleViolation(
        _MEMORY_UTILIZATION,
        f"{node.value} is out of range: it must be a fraction above 0 and below 1",
        fixes=(run.set_fix(_MEMORY_UTILIZATION, suggestion),),
    )


@rule(
    "LOAD010",
    f"{_ENGINE} {_FAST_INFERENCE}",
    example="model:\n  fast_inference: false\nruntime:\n  engine: vllm",
    fix="engine: transformers",
)
def engine_and_fast_inference_agree(run: Run) -> Iterator[RuleViolation]:
    """runtime.engine and model.fast_inference do not contradict each other.

    Both keys choose the engine. runtime.engine chooses it by name, and fast_inference: true chooses
    the vLLM engine.
    """
    engine, fast = run.value(_ENGINE), run.value(_FAST_INFERENCE)
    consistent_value = {("vllm", False): True, ("transformers", True): False}.get((engine, fast))
    if consistent_value is not None:
        yield RuleViolation(
            _ENGINE,
            f"{engine} contradicts fast_inference {str(fast).lower()}",
            notes=(run.describe(_FAST_INFERENCE),),
            fixes=(run.set_fix(_FAST_INFERENCE, consistent_value), run.set_fix(_ENGINE, "auto")),
            related=(_FAST_INFERENCE,),
        )


@rule(
    "LOAD040",
    "model.dequantized_rollouts model.load_in_4bit model.tensor_parallel_size",
    example="model:\n  dequantized_rollouts: true  # with load_in_4bit: false, the default",
    fix="dequantized_rollouts: auto",
    severity=Severity.WARNING,
)
def dequantizing_needs_4bit_weights(run: Run) -> Iterator[RuleViolation]:
    """dequantized_rollouts: true needs base weights in 4 bits and an engine on one GPU.

    The key replaces 4-bit weights by 16-bit copies while the engine samples. Weights that are
    stored in 16 bits need no copy. An engine on several GPUs has worker processes, in which the
    toolkit cannot replace weights.
    """
    key = "model.dequantized_rollouts"
    setting = run.value(key)
    if run.engine == "transformers" or setting in ("auto", False):
        return
    for required_key, required_value in (
        ("model.load_in_4bit", True),
        ("model.tensor_parallel_size", 1),
    ):
        if run.value(required_key) != required_value:
            yield RuleViolation(
                key,
                "has no effect: it needs 4-bit weights and an engine on one GPU",
                notes=(run.describe(required_key),),
                fixes=(run.set_fix(key, "auto"),),
                related=(required_key,),
            )
            return
