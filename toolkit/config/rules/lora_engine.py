"""Rules on the adapter with the vLLM engine: which ranks and adapters vLLM supports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Fix, Severity
from toolkit.config.libraries import allowed_values, smallest_rank
from toolkit.config.rules.training import REMOVE_HEAD_FIX, adapts_head
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.supported_features import engine_init_problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run
    from toolkit.config.source import KeyPath

_RANK = "lora.r"
_MAX_RANK = "model.max_lora_rank"
_TARGETS = "lora.target_modules"


@rule(
    "LORA002",
    _MAX_RANK,
    example="model:\n  max_lora_rank: 24",
    fix="max_lora_rank: 32",
)
def max_rank_is_supported(run: Run) -> Iterator[RuleViolation]:
    """max_lora_rank is one of the ranks that vLLM has kernels for.

    vLLM accepts only 1, 8, 16, 32, 64, 128, 256, 320 and 512. If vLLM is installed, the list is
    read from the installed vLLM. auto chooses the smallest of these ranks that is at least lora.r.
    The toolkit never changes a value that the run file sets.
    """
    node = run.node(_MAX_RANK)
    if node is None or run.engine == "transformers" or type(node.value) is not int:
        return
    supported = allowed_values("lora_ranks")
    if node.value in supported.values:
        return
    next_rank = smallest_rank(max(node.value, 1), supported.values) or max(supported.values)
    yield RuleViolation(
        _MAX_RANK,
        f"{node.value} is not a rank that {supported.origin} supports",
        notes=(f"legal values: auto, {', '.join(map(str, supported.values))}",),
        fixes=(run.set_fix(_MAX_RANK, next_rank),),
    )


@rule(
    "LORA003",
    f"{_RANK} {_MAX_RANK} lora.rank_pattern",
    example="model:\n  max_lora_rank: 64\nlora:\n  r: 65",
    fix="max_lora_rank: 128, or r: 64",
)
def rank_fits(run: Run) -> Iterator[RuleViolation]:
    """lora.r, and each rank of lora.rank_pattern, is at most max_lora_rank.

    When the engine starts, it allocates memory for adapters of rank max_lora_rank. With an adapter
    of a higher rank vLLM would fail in the first step, after everything is loaded.
    """
    if run.engine == "transformers":
        return
    max_rank, supported = run.value(_MAX_RANK), allowed_values("lora_ranks")
    largest = max(supported.values)
    if max_rank != "auto" and max_rank not in supported.values:
        return  # LORA002 reports this fault
    limit = largest if max_rank == "auto" else max_rank
    for path, rank_text, rank in _ranks(run):
        if rank <= limit:
            continue
        lower_fix = _lower_rank_fix(run, path, limit)
        if max_rank == "auto":
            yield RuleViolation(
                path,
                f"rank {rank} is above {largest}, the largest rank that {supported.origin} "
                "supports",
                fixes=(lower_fix,),
            )
            continue
        next_rank = smallest_rank(rank, supported.values)
        yield RuleViolation(
            path,
            f"{rank} is more than max_lora_rank {max_rank}",
            notes=(f"{rank_text} > {run.describe(_MAX_RANK)}",),
            fixes=(*((run.set_fix(_MAX_RANK, next_rank),) if next_rank else ()), lower_fix),
            related=(_MAX_RANK,),
        )


def _ranks(run: Run) -> Iterator[tuple[KeyPath, str, int]]:
    """Yield three values for lora.r and for each rank in lora.rank_pattern: the key path, a text
    that says where the rank was set, and the rank.
    """
    yield ("lora", "r"), run.describe(_RANK), run.value(_RANK)
    for key, rank in run.mapping("lora.rank_pattern").items():
        path = ("lora", "rank_pattern", key)
        yield path, f"rank of {key} {rank} ({run.origin(run.document.find_node(path))})", rank


def _lower_rank_fix(run: Run, path: KeyPath, rank: int) -> Fix:
    """The fix that sets the key ``path`` to a lower rank."""
    node = run.document.find_node(path)
    if len(path) == 2 or node is None or node.source.is_override:
        return run.set_fix(_RANK, rank) if len(path) == 2 else Fix(f"{path[-1]}: {rank}")
    return Fix(f"{path[-1]}: {rank}", run.replace_fix(node, rank).edits)


@rule(
    "LORA004",
    f"lora.bias lora.use_dora lora.modules_to_save {_TARGETS} lora.init_lora_weights",
    example="runtime: {engine: vllm}\nlora:\n  use_dora: true",
    fix="use_dora: false, or runtime.engine: transformers",
)
def engine_supports_adapter(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, the adapter is plain LoRA on linear layers.

    vLLM does not support trained biases, DoRA, modules_to_save, or an adapter on embed_tokens or
    lm_head. vLLM's latent attention (DeepSeek) ignores an adapter on kv_b_proj. PiSSA, OLoRA,
    CorDA, LoftQ, EVA and LoRA-GA cannot be used: they rewrite the base weights that engine and
    trainer share, or need inputs that a run file cannot set.
    """
    if run.engine == "transformers" or run.get("model.full_finetuning"):
        return
    severity = Severity.ERROR if run.engine == "vllm" else Severity.WARNING
    for key, problem, fix in _unsupported_settings(run):
        yield RuleViolation(
            key,
            problem if run.engine == "vllm" else f"{problem} (engine: auto uses vLLM if installed)",
            notes=(run.describe("runtime.engine"),),
            fixes=(fix, run.set_fix("runtime.engine", "transformers"))
            if fix is not REMOVE_HEAD_FIX
            else (fix,),
            severity=severity,
        )


def _unsupported_settings(run: Run) -> Iterator[tuple[str, str, Fix]]:
    bias = run.get("lora.bias")
    if bias != "none":
        yield (
            "lora.bias",
            f"vLLM does not support trained biases ({bias})",
            run.set_fix("lora.bias", "none"),
        )
    if run.get("lora.use_dora"):
        yield "lora.use_dora", "vLLM does not support DoRA", run.set_fix("lora.use_dora", False)
    if run.get("lora.modules_to_save"):
        problem = "vLLM does not support modules that are fully trained"
        yield "lora.modules_to_save", problem, Fix("remove modules_to_save")
    targets = run.get(_TARGETS)
    if "embed_tokens" in targets:
        yield (
            _TARGETS,
            "vLLM does not support an adapter on embed_tokens",
            Fix("remove embed_tokens from target_modules"),
        )
    if "kv_b_proj" in targets:
        problem = "vLLM's latent attention ignores an adapter on kv_b_proj"
        yield _TARGETS, problem, Fix("remove kv_b_proj from target_modules")
    if adapts_head(run) and not _head_reported_elsewhere(run):
        yield _TARGETS, "vLLM does not support an adapter on lm_head", REMOVE_HEAD_FIX
    init = run.get("lora.init_lora_weights")
    init_problem = engine_init_problem(init)
    reported_elsewhere = init == "loftq" and run.get("model.load_in_4bit")  # LORA005
    if init_problem is not None and not reported_elsewhere:
        yield "lora.init_lora_weights", init_problem, run.set_fix("lora.init_lora_weights", True)


def _head_reported_elsewhere(run: Run) -> bool:
    """Whether another rule (GRPO013 for Liger, or GRPO014 for cast_lm_head_to_fp32) already reports
    the adapter on lm_head.
    """
    return bool(run.get("grpo.use_liger_kernel") or run.get("grpo.cast_lm_head_to_fp32"))


@rule(
    "LORA012",
    _TARGETS,
    example="runtime: {engine: transformers}\nlora:\n  target_modules: [q_proj, lm_head]",
    fix="remove lm_head from target_modules",
)
def no_adapter_on_lm_head(run: Run) -> Iterator[RuleViolation]:
    """lm_head cannot have an adapter.

    TRL computes log-probabilities from lm_head.weight directly, so an adapter on lm_head would
    never be trained. TRL refuses such an adapter, but only after the model has loaded.
    """
    if run.engine == "transformers" and adapts_head(run) and not _head_reported_elsewhere(run):
        yield RuleViolation(
            _TARGETS, "an adapter on lm_head would never be trained", fixes=(REMOVE_HEAD_FIX,)
        )


@rule(
    "LORA009",
    "model.max_cpu_loras model.max_loras",
    example="model:\n  max_loras: 4\n  max_cpu_loras: 2",
    fix="max_cpu_loras: 4",
)
def cpu_adapters_cover_gpu_adapters(run: Run) -> Iterator[RuleViolation]:
    """max_cpu_loras is at least max_loras.

    Every adapter on the GPU is also kept in main memory.
    """
    cpu, gpu = run.value("model.max_cpu_loras"), run.value("model.max_loras")
    if cpu is not None and cpu < gpu:
        yield RuleViolation(
            "model.max_cpu_loras",
            f"{cpu} is less than max_loras {gpu}",
            notes=(f"{run.describe('model.max_cpu_loras')} < {run.describe('model.max_loras')}",),
            fixes=(run.set_fix("model.max_cpu_loras", gpu),),
            related=("model.max_loras",),
        )
