"""Functions that convert values, for use by the tables of several formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.mapping import UnsupportedValue

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

NO_ADAPTER = "a run trains a LoRA adapter (section lora) unless model.full_finetuning is true"


def convert_dtype(value: object) -> str | None:
    """Return the name of a torch dtype, such as "bfloat16". Return None if ``value`` means that the
    dtype of the checkpoint or of the GPU is used. Raises UnsupportedValue for a dtype that a run
    file cannot set.
    """
    if value in (None, "auto", ""):
        return None
    name = str(value).removeprefix("torch.")
    long_names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    name = long_names.get(name, name)
    if name not in ("bfloat16", "float16", "float32"):
        raise UnsupportedValue("model.dtype must be bfloat16, float16, float32 or auto")
    return name


_UNCHANGED = object()


def new_name(value: object, names: dict[str, Any], fallback: Any = _UNCHANGED) -> Any:
    """Return the new name of ``value``, as the dict ``names`` defines it. A value that is not in
    ``names`` becomes ``fallback`` if ``fallback`` is given, and otherwise stays unchanged.
    """
    if isinstance(value, str) and value in names:
        return names[value]
    return value if fallback is _UNCHANGED else fallback


def as_integer(value: object) -> Any:
    """Return a whole float such as ``16.0`` as an integer, because some tools write integers as
    floats. Any other value is returned unchanged.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def positive_or_none(value: object) -> Any:
    """Return None for null, 0 and negative numbers, which mean "no limit" in some tools. Return any
    other value, with a whole float such as ``16.0`` converted to an integer.
    """
    if value is None or (isinstance(value, (int, float)) and value <= 0):
        return None
    return as_integer(value)


def convert_targets(value: object) -> Any:
    """Return the value of ``lora.target_modules``. The list ["all-linear"] becomes the text
    "all-linear", and any other value stays unchanged.
    """
    return "all-linear" if value == ["all-linear"] else value


def function_path(name: str) -> str:
    """Return the dotted name ``package.module.function`` in the form ``package.module:function``.
    Raises UnsupportedValue if ``name`` is not a dotted name.
    """
    module, _, last = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise UnsupportedValue("the name does not have the form module.function")
    return f"{module}:{last}"


def function_in_file(path: Any, name: Any) -> str:
    """Return the name of a function in a Python file in the form ``module:function``. The module is
    the file's name without its folder and ``.py``. Raises UnsupportedValue if this is not a valid
    module name.
    """
    stem = str(path).replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    if not stem.isidentifier():
        raise UnsupportedValue(f"{stem} cannot be the name of a Python module")
    return f"{stem}:{name}"


def set_sequence_length(translation: Translation) -> None:
    """Set ``model.max_seq_length`` to the sum of the maximum lengths of prompt and completion,
    unless it is already set.

    If the prompt has no maximum length, the result depends on the maximum length of the completion.
    From 2048 tokens on, 1024 tokens are added for the prompt. Below 2048 tokens, the default of
    ``model.max_seq_length`` is kept.
    """
    if "model.max_seq_length" in translation.run_values:
        return
    prompt, completion = (
        translation.get("grpo.max_prompt_length"),
        translation.get("grpo.max_completion_length"),
    )
    if not isinstance(completion, int) or isinstance(completion, bool):
        return
    if isinstance(prompt, int):
        total = prompt + completion
        why = f"max_prompt_length {prompt} + max_completion_length {completion}"
        translation.write("model.max_seq_length", total, why)
    elif completion >= 2048:
        why = f"max_completion_length {completion} + 1024 for the prompt, which has no limit"
        translation.write("model.max_seq_length", completion + 1024, why)


def set_batch_size(translation: Translation, completions: int, why: str) -> None:
    """Set the batch keys of the run file so that one optimizer step uses ``completions``
    completions. The micro-batch keys are set to "auto", so that the toolkit chooses sizes that fit
    the GPU.
    """
    translation.write("grpo.generation_batch_size", completions, why)
    translation.write(
        "grpo.per_device_train_batch_size",
        "auto",
        "the toolkit chooses a size that fits the GPU; the size does not change the gradient",
    )
    translation.write("grpo.gradient_accumulation_steps", "auto", "see per_device_train_batch_size")


def set_warmup_steps(translation: Translation) -> None:
    """If the file sets the warm-up both in steps and as a fraction, use the steps, as transformers
    does.
    """
    steps, ratio = (
        translation.find_entries("warmup_steps"),
        translation.find_entries("warmup_ratio"),
    )
    if steps and ratio:
        entry = steps["warmup_steps"]
        if isinstance(entry.value, (int, float)) and entry.value > 0:
            translation.write("grpo.warmup_steps", entry.value, f"{entry.location}: warmup_steps")


def is_positive_integer(value: object) -> bool:
    """Whether a value is a positive integer."""
    return type(value) is int and value > 0
