"""Convert a run file's model section to a load request, and choose the engine of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from toolkit.config.engine_settings import OPTIONS
from toolkit.config.resolved import resolve_engine, resolve_run
from toolkit.policy.load_request import LoadRequest, check_request
from toolkit.policy.machine_facts import detect_machine

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig

REQUEST_FIELDS = (
    "model_name",
    "max_seq_length",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "load_in_16bit",
    "load_in_fp8",
    "full_finetuning",
    "revision",
    "trust_remote_code",
    "attn_implementation",
)


def choose_engine(config: RunConfig) -> Literal["vllm", "transformers"]:
    """Return the engine that ``config`` uses on this machine. See
    ``config.resolved.resolve_engine``.
    """
    engine = resolve_engine(config.runtime.engine, config.model.fast_inference, detect_machine())
    assert engine != "maybe"  # returned only if the device is unknown
    return engine


def make_load_request(config: RunConfig) -> LoadRequest:
    """Return the load request for the model section of a run file. Values that are still "auto" are
    chosen for this machine.

    Raises the errors of ``policy.load_request.check_request``.
    """
    run = resolve_run(config, detect_machine())
    config, uses_engine = run.config, run.engine == "vllm"
    names = REQUEST_FIELDS + (tuple(OPTIONS) if uses_engine else ())
    values = {name: getattr(config.model, name) for name in names}
    if uses_engine and config.model.enable_chunked_prefill:
        values["enable_chunked_prefill"] = None  # vLLM decides, because not every model supports it
    return check_request(
        {
            **values,
            "fast_inference": uses_engine,
            "random_state": config.lora.random_state,
            "use_gradient_checkpointing": config.lora.use_gradient_checkpointing,
            # With use_liger_kernel, TRL itself puts Liger's kernels on the model. Then the toolkit
            # does not put its own kernels on it.
            "fused_kernels": config.runtime.fused_kernels
            if not config.grpo.get("use_liger_kernel")
            else False,
        }
    )
