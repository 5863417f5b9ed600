"""Translate keyword arguments of GRPOConfig from older versions of TRL, transformers and Unsloth.

Older scripts and notebooks pass such arguments. Each argument is translated, or dropped if it has
no effect any more. One warning lists all translated and dropped arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.did_you_mean import nearest
from toolkit.base.errors import ConfigTypeError, ConfigValueError
from toolkit.config.common_names import COMMON_NAMES
from toolkit.config.migration import MOVED_KEYS
from toolkit.config.sampling_keywords import KEYWORDS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from toolkit.train.error_collector import ErrorCollector

WHERE = "GRPOConfig"
SET_AT_LOADING = "FastLanguageModel.from_pretrained sets it"
NO_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        ("vllm_device", "vllm_dtype", "vllm_max_model_len", "vllm_enable_prefix_caching"),
        SET_AT_LOADING,
    ),
    **dict.fromkeys(
        (
            "half_precision_backend", "fp16_backend", "fp16_opt_level", "jit_mode_eval", "use_ipex",
            "tpu_num_cores", "past_index", "ray_scope", "torchdynamo", "use_mps_device",
            "mp_parameters", "include_tokens_per_second", "overwrite_output_dir",
        ),
        "transformers has removed it",
    ),
    "logging_dir": "the variable TENSORBOARD_LOGGING_DIR sets TensorBoard's folder",
    "unsloth_logit_chunk_multiplier": "log-probabilities are always computed in chunks",
}  # fmt: skip
"""Fields that have no effect any more, each with the reason. ``config.migration`` has more."""
SHARED_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of vLLM's SamplingParams that GRPOConfig has under the same name."""
SET_BY_TRAINER = {
    "n": "num_generations sets it",
    "max_tokens": "max_completion_length sets it",
    "seed": "each completion is drawn from its own seed, which follows from GRPOConfig's seed",
    "logprobs": "the engine always returns the log-probabilities of the sampled tokens",
    "output_kind": "the trainer reads whole completions",
    "detokenize": "the trainer reads tokens",
}
"""Fields of SamplingParams that the trainer sets itself."""


class Translated(NamedTuple):
    """The result of ``translate``. ``kwargs`` are fields of the toolkit's GRPOConfig. ``notes``
    contains one sentence for each field that was translated or dropped.
    """

    kwargs: dict[str, Any]
    notes: list[str]


def translate(
    arguments: Mapping[str, Any], current_fields: Collection[str], collector: ErrorCollector
) -> Translated:
    """Return the keyword ``arguments``, with older names of fields replaced by the current
    names. ``current_fields`` are the fields of the toolkit's GRPOConfig.

    A wrong field is left out, and its error is added to ``collector``. An unknown name is a
    ConfigTypeError. An invalid value is a ConfigValueError. It is also a ConfigValueError if the
    old name and the new name of a field have different values.
    """
    fields: dict[str, Any] = {
        name: value for name, value in arguments.items() if name in current_fields
    }
    notes: list[str] = []
    for name, value in arguments.items():
        if name not in current_fields:
            with collector.collect_error():
                notes += _translate_field(fields, name, value, current_fields)
    return Translated(fields, notes)


def _translate_field(
    fields: dict[str, Any], name: str, value: object, current_fields: Collection[str]
) -> list[str]:
    """Add ``value`` to the ``fields``. ``name`` is the older name of the field, and the value
    is added under the current name. A field without a current name is left out. Return the notes
    for the user.
    """
    if name == "vllm_sampling_params":
        return _translate_sampling_params(fields, value)
    if name == "warmup_ratio":
        return _translate_warmup_ratio(fields, value)
    if name == "no_cuda":
        return _set_renamed_field(fields, name, "use_cpu", bool(value))
    if name in NO_EFFECT:
        return [f"{name} is left out: {NO_EFFECT[name]}"]
    return _translate_moved_field(fields, name, value, current_fields)


def _translate_moved_field(
    fields: dict[str, Any], name: str, value: object, current_fields: Collection[str]
) -> list[str]:
    moved = MOVED_KEYS.get(f"grpo.{name}")
    if moved is None:
        renamed_field = COMMON_NAMES.get(f"grpo.{name}", "").rpartition(".")[2]
        suggestion = renamed_field or nearest(name, current_fields)
        raise ConfigTypeError(
            f"{name!r} is not a field of GRPOConfig"
            + (f" (did you mean {suggestion!r}?)" if suggestion else ""),
            where=WHERE,
            fix="correct its name or leave it out",
        )
    section, _, current_name = (moved.new_key or "").rpartition(".")
    if section == "grpo":
        return _set_renamed_field(fields, name, current_name, value)
    if moved.new_key is None:
        return [f"{name} is left out: {moved.details}"]
    if section == "model":
        return [f"{name} is left out: pass {current_name} to FastLanguageModel.from_pretrained"]
    raise ConfigTypeError(
        f"{name!r} is not a field of GRPOConfig. In a run file, this option is {moved.new_key}",
        where=WHERE,
        fix=f"remove {name} from GRPOConfig, and set the option where your script loads the model "
        "or the data",
    )


def _set_renamed_field(fields: dict[str, Any], old: str, new: str, value: object) -> list[str]:
    if new in fields and fields[new] != value:
        raise ConfigValueError(
            f"{old} is the older name of {new}, but {old}={value!r} and {new}={fields[new]!r} "
            "differ",
            where=WHERE,
            fix=f"remove {old}",
        )
    fields[new] = value
    return [f"{old} is now called {new}"]


def _translate_warmup_ratio(fields: dict[str, Any], ratio: Any) -> list[str]:
    """Translate ``warmup_ratio`` to ``warmup_steps``. transformers 5 reads a value of
    ``warmup_steps`` below 1 as a share of the run. If the user also passed ``warmup_steps``,
    ``warmup_ratio`` is ignored, as in transformers 4. Return the notes for the user.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ConfigValueError(
            f"warmup_ratio={ratio!r} must be at least 0 and below 1",
            where=WHERE,
            fix="set warmup_steps to a number of steps, or to a value below 1 (a share of the run)",
        )
    if fields.get("warmup_steps"):
        return [f"warmup_ratio is left out, because warmup_steps={fields['warmup_steps']} is set"]
    fields["warmup_steps"] = ratio
    return [f"warmup_ratio={ratio} is now warmup_steps={ratio} (below 1: a share of the run)"]


def _translate_sampling_params(fields: dict[str, Any], params: Any) -> list[str]:
    """Add the sampling options ``params`` (vLLM's SamplingParams, or a mapping) to ``fields``, the
    fields of GRPOConfig. An option that is not a field of GRPOConfig is added to
    ``generation_kwargs``. Return the notes for the user.
    """
    generation_kwargs = dict(fields.get("generation_kwargs") or {})
    notes = []
    for name, value in sampling_fields(params).items():
        keyword = KEYWORDS["vllm"].get(name)
        if name in SET_BY_TRAINER:
            notes.append(f"{name} is left out ({SET_BY_TRAINER[name]})")
        elif keyword is not None and keyword.unused is not None:
            notes.append(f"{name} is left out ({keyword.unused})")
        elif name in SHARED_SAMPLING_FIELDS and fields.get(name) is None:
            fields[name] = value
            notes.append(f"{name}={value}")
        elif name in SHARED_SAMPLING_FIELDS:
            if fields[name] != value:
                notes.append(
                    f"{name}={value} is ignored, because GRPOConfig sets {name}={fields[name]}"
                )
        elif name not in generation_kwargs:
            generation_kwargs[name] = value
            notes.append(f"{name} is in generation_kwargs")
    if generation_kwargs:
        fields["generation_kwargs"] = generation_kwargs
    return [
        f"vllm_sampling_params is read as fields of GRPOConfig: {', '.join(notes) or 'nothing'}"
    ]


def sampling_fields(params: Any) -> dict[str, Any]:
    """Return the fields of ``params`` that differ from the defaults of its class.

    Raises:
        ConfigTypeError: ``params`` is neither vLLM's SamplingParams nor a mapping.
    """
    if params is None:
        return {}
    if isinstance(params, dict):
        return dict(params)
    names = getattr(type(params), "__struct_fields__", None)  # a msgspec class
    if names is None:
        raise ConfigTypeError(
            f"vllm_sampling_params has the type {type(params).__name__}, which is not supported",
            where=WHERE,
            fix="pass vllm.SamplingParams(...), or a dictionary of its fields",
        )
    default = type(params)()
    public = [name for name in names if not name.startswith("_")]
    return {
        name: getattr(params, name)
        for name in public
        if getattr(params, name) != getattr(default, name)
    }
