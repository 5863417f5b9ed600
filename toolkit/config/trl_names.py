"""Tables of the names that TRL's trainer accepts as values, for example the names of schedules,
optimizers and trackers. The tables also contain the packages that these values need.

The tables were recorded from transformers 5.17, accelerate and TRL 1.16, so that a run file can be
validated without importing these libraries. tests/contract/test_config_upstream.py compares the
tables with the installed versions.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class Schedule(NamedTuple):
    """The keyword arguments of a learning rate schedule, except those that the trainer passes
    itself.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    reads_kwargs: bool = True  # whether get_scheduler passes lr_scheduler_kwargs to this schedule

    @property
    def keywords(self) -> tuple[str, ...]:
        """All keywords, the required ones first."""
        return (*self.required, *self.optional)


PASSED_BY_THE_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Keywords of schedules that a run file cannot set, because the trainer sets them itself."""

_MIN_LR = ("num_cycles", "min_lr", "min_lr_rate")
_PLATEAU = (
    "mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps",
)  # fmt: skip
_GREEDY = ("warmup", "max_lr", "verbose", "smooth", "window_size", "reset_start")
SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(),
    "cosine": Schedule(optional=("num_cycles",)),
    "cosine_with_restarts": Schedule(optional=("num_cycles",)),
    "polynomial": Schedule(optional=("lr_end", "power")),
    "constant": Schedule(reads_kwargs=False),
    "constant_with_warmup": Schedule(reads_kwargs=False),
    "inverse_sqrt": Schedule(optional=("timescale",)),
    "reduce_lr_on_plateau": Schedule(optional=_PLATEAU),
    "cosine_with_min_lr": Schedule(optional=_MIN_LR),
    "cosine_warmup_with_min_lr": Schedule(optional=(*_MIN_LR, "warmup_lr_rate")),
    "warmup_stable_decay": Schedule(
        ("num_decay_steps",),
        ("num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
    "greedy": Schedule(optional=(*_PLATEAU, *_GREEDY)),
}
SCHEDULE_CHOICES: dict[str, tuple[str, ...]] = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
}
"""Keywords of schedules whose value is one of these words. The values of all other keywords are
numbers or booleans.
"""
SCHEDULE_SWITCHES = ("verbose", "smooth")
SCHEDULE_INTEGERS = (
    "num_decay_steps", "num_stable_steps", "timescale", "patience", "cooldown", "warmup",
    "window_size", "reset_start",
)  # fmt: skip


class Package(NamedTuple):
    """A Python package. It counts as installed if one of its ``modules`` can be found. ``install``
    is its name for ``pip install``.
    """

    modules: tuple[str, ...]
    install: str


class Optimizer(NamedTuple):
    """An optimizer. ``package`` is the package that it needs (None: no extra package). ``options``
    are the names that it reads from ``optim_args``.
    """

    package: Package | None = None
    options: tuple[str, ...] = ()


_BNB = Package(("bitsandbytes",), "bitsandbytes")
_TORCHAO = Package(("torchao",), "torchao")
_GALORE = Package(("galore_torch",), "galore-torch")
_APOLLO = Package(("apollo_torch",), "apollo-torch")
_FREE = Package(("schedulefree",), "schedulefree")
_LOMO = Package(("lomo_optim",), "lomo-optim")
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
_LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")
_ANYPRECISION = (
    "use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype",
)  # fmt: skip
_GROK = ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping")
_FAMILIES: tuple[tuple[Optimizer, str], ...] = (
    (Optimizer(), "adamw_torch adamw_torch_fused adafactor"),
    (Optimizer(None, ("momentum", "dampening", "weight_decay", "nesterov")), "sgd"),
    (Optimizer(None, ("lr_decay", "weight_decay", "eps")), "adagrad"),
    (Optimizer(None, ("momentum", "alpha", "eps", "weight_decay", "centered")), "rmsprop"),
    (Optimizer(Package(("torch_xla",), "torch-xla")), "adamw_torch_xla"),
    (Optimizer(Package(("torch_npu",), "torch-npu")), "adamw_torch_npu_fused"),
    (Optimizer(Package(("torchdistx",), "torchdistx"), _ANYPRECISION), "adamw_anyprecision"),
    (
        Optimizer(_TORCHAO, ("block_size", "bf16_stochastic_round")),
        "adamw_torch_4bit adamw_torch_8bit",
    ),
    (
        Optimizer(_BNB),
        "adamw_bnb_8bit adamw_8bit lion_8bit lion_32bit paged_adamw_32bit paged_adamw_8bit"
        " paged_lion_32bit paged_lion_8bit rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit",
    ),
    (
        Optimizer(_BNB, _ADEMAMIX),
        "ademamix ademamix_8bit paged_ademamix_32bit paged_ademamix_8bit",
    ),
    (
        Optimizer(_GALORE, _LOW_RANK),
        "galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise"
        " galore_adamw_8bit_layerwise galore_adafactor_layerwise",
    ),
    (
        Optimizer(_APOLLO, ("proj", "scale_type", *_LOW_RANK)),
        "apollo_adamw apollo_adamw_layerwise",
    ),
    (Optimizer(_LOMO), "lomo adalomo"),
    (Optimizer(Package(("grokadamw",), "grokadamw"), _GROK), "grokadamw"),
    (
        Optimizer(_FREE, ("weight_lr_power", "r")),
        "schedule_free_radam schedule_free_adamw schedule_free_sgd",
    ),
    (
        Optimizer(Package(("optimi",), "torch-optimi"), ("max_lr", "kahan_sum", "decouple_lr")),
        "stable_adamw",
    ),
)
OPTIMIZERS: dict[str, Optimizer] = {
    name: optimizer for optimizer, names in _FAMILIES for name in names.split()
}
TARGETED_OPTIMIZERS = ("galore", "apollo")
"""Beginnings of the names of the optimizers that read optim_target_modules."""

TRACKERS: dict[str, Package | None] = {
    "azure_ml": Package(("azureml",), "azureml-core"),
    "comet_ml": Package(("comet_ml",), "comet-ml"),
    "mlflow": Package(("mlflow",), "mlflow"),
    "neptune": Package(("neptune",), "neptune"),
    "tensorboard": Package(("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": Package(("trackio",), "trackio"),
    "wandb": Package(("wandb",), "wandb"),
    "codecarbon": Package(("codecarbon",), "codecarbon"),
    "clearml": Package(("clearml",), "clearml"),
    "dagshub": Package(("dagshub",), "dagshub"),
    "flyte": Package(("flytekit",), "flytekit"),
    "dvclive": Package(("dvclive",), "dvclive"),
    "swanlab": Package(("swanlab",), "swanlab"),
    "kubeflow": None,  # no package is needed, because transformers calls the server directly
}
"""The trackers that report_to accepts, under their names in transformers, and their packages."""
TRACKER_WORDS = ("none", "all")
LIGER_PACKAGE = Package(("liger_kernel",), "liger-kernel")

ACCELERATOR_KEYS: dict[str, type | tuple[type, ...]] = {
    "split_batches": bool,
    "dispatch_batches": (bool, type(None)),
    "even_batches": bool,
    "use_seedable_sampler": bool,
    "non_blocking": bool,
    "gradient_accumulation_kwargs": (dict, type(None)),
    "use_configured_state": bool,
}
"""The keys of accelerator_config, and the types of their values (transformers' AcceleratorConfig).
"""
DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")
CACHE_IMPLEMENTATIONS = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
"""The values of cache_implementation, without the deprecated names that transformers still accepts.
"""
QUANTIZED_CACHE = Package(("optimum.quanto",), "optimum-quanto")
BATCHING_KEYS = (
    "block_size", "num_blocks", "max_batch_tokens", "max_memory_percent", "max_requests_per_batch",
    "max_blocks_per_request", "allow_block_sharing", "use_async_batching", "use_cuda_graph",
    "disable_nccl_graph_mixing", "q_padding_interval_size", "kv_padding_interval_size",
    "max_cached_graphs", "varlen_compile_config", "decode_compile_config",
    "use_default_compile_configs", "default_compile_level", "scheduler_type", "max_queue_size",
    "safety_margin", "return_logprobs", "seed", "cpu_group_timeout", "cpu_offload_space",
    "cpu_offload_space_safety_threshold", "per_request_processors", "drop_unsupported_processors",
)  # fmt: skip
"""The keys of transformers_continuous_batching_config."""

COMPILE_BACKENDS = (
    "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi",
    "fx2trt", "onnxrt", "tensorrt", "aot_torchxla_trace_once", "torchxla_trace_once", "tvm",
    "hpu_backend", "neuron",
)  # fmt: skip
"""The values that torch_compile_backend accepts: those of accelerate, except "no"."""
COMPILE_MODES = (
    "default", "lite", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune",
)  # fmt: skip
ROUTER_LOGIT_TYPES = frozenset(
    (
        "afmoe", "dbrx", "deepseek_v4", "doge", "ernie4_5_moe", "ernie4_5_vl_moe_text", "flex_olmo",
        "glm5_next_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
        "granitemoeshared", "hy_v3", "jamba", "jetmoe", "laguna", "llama4_text", "mellum",
        "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nllb-moe", "olmoe",
        "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
        "qwen3_next", "qwen3_omni_moe_talker_text", "qwen3_omni_moe_text", "qwen4_exp_text", "zaya",
    )
)  # fmt: skip
"""The model types (mixtures of experts) that can return the logits of their routers. The auxiliary
loss is computed from these logits.
"""


@cache
def is_installed(package: Package) -> bool:
    """Whether ``package`` is installed. This is determined without importing the package."""
    return any(_module_exists(module) for module in package.modules)


def _module_exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def needed_packages(
    report_to: Sequence[str], optim: str, *, use_liger: bool, cache: str | None = None
) -> Iterator[tuple[str, str, Package]]:
    """Yield (key, value, package) for each of the given settings of the grpo section that needs a
    package. ``cache`` is the value of ``cache_implementation``.
    """
    for tracker in report_to:
        package = TRACKERS.get(tracker)
        if package is not None:
            yield "report_to", tracker, package
    optimizer = OPTIMIZERS.get(optim)
    if optimizer is not None and optimizer.package is not None:
        yield "optim", optim, optimizer.package
    if use_liger:
        yield "use_liger_kernel", "true", LIGER_PACKAGE
    if cache == "quantized":
        yield "cache_implementation", cache, QUANTIZED_CACHE


def packages_for_grpo(grpo: Mapping[str, Any]) -> Iterator[tuple[str, str, Package]]:
    """Yield (key, value, package) for each key in ``grpo`` whose value needs a package. ``grpo`` is
    the content of a run's grpo section.
    """
    trackers = grpo.get("report_to")
    yield from needed_packages(
        [trackers] if isinstance(trackers, str) else list(trackers or ()),
        grpo.get("optim", ""),
        use_liger=bool(grpo.get("use_liger_kernel")),
        cache=grpo.get("cache_implementation"),
    )


def _is_nonzero(value: object) -> bool:
    return value is not None and value != 0


SPLIT_DEPENDENT_FIELDS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "loss_type": lambda value: value == "bnpo",
        "top_entropy_quantile": lambda value: value is not None and value < 1,
        "entropy_coef": _is_nonzero,
        "use_adaptive_entropy": lambda value: value is True,
        "router_aux_loss_coef": _is_nonzero,
    }
)
"""Fields of TRL 1.16's GRPOConfig that can make the loss depend on how a batch is split into
micro-batches. The loss then contains a mean over the tokens of a micro-batch, a quantile, an
entropy bonus or a router loss. The function for a field returns whether a value of the field has
this effect.
"""
