"""Conversions of values that several formats share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.mapping import Unfit

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

NO_ADAPTER = "all weights are trained there; here an adapter is (lora)"


def dtype(value: Any) -> str | None:
    """The name of a torch dtype; None if the checkpoint or the card decides."""
    if value in (None, "auto", ""):
        return None
    name = str(value).removeprefix("torch.")
    known = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    name = known.get(name, name)
    if name not in ("bfloat16", "float16", "float32"):
        raise Unfit("model.dtype is bfloat16, float16, float32 or auto")
    return name


_SAME = object()


def renamed(value: Any, names: dict[str, Any], other: Any = _SAME) -> Any:
    """The value that ``names`` has for ``value``. If it has none: ``other`` if given, else
    ``value`` unchanged.
    """
    if isinstance(value, str) and value in names:
        return names[value]
    return value if other is _SAME else other


def as_integer(value: Any) -> Any:
    """``16.0`` as the integer 16; any other value unchanged. Some tools write integers as
    floats.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def positive(value: Any) -> Any:
    """A count; None for -1, 0 and null, which mean "no limit" in some tools."""
    if value is None or (isinstance(value, (int, float)) and value <= 0):
        return None
    return as_integer(value)


def targets(value: Any) -> Any:
    """Target modules: ["all-linear"] becomes the text all-linear; any other value is unchanged."""
    return "all-linear" if value == ["all-linear"] else value


def module_function(name: str) -> str:
    """``package.module.function`` as ``package.module:function``."""
    head, _, last = name.rpartition(".")
    if not head or not all(part.isidentifier() for part in name.split(".")):
        raise Unfit("it is not of the form module.function")
    return f"{head}:{last}"


def from_file(path: Any, name: Any) -> str:
    """A function in a Python file as ``module:function``. The folder of the file is left out."""
    stem = str(path).replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    if not stem.isidentifier():
        raise Unfit(f"{stem} is not the name of a module")
    return f"{stem}:{name}"


def fit_length(made: Translation) -> None:
    """Set model.max_seq_length if the lengths of prompt and completion do not fit into its default,
    and nothing else has set it.
    """
    if "model.max_seq_length" in made.written:
        return
    prompt, completion = made.get("grpo.max_prompt_length"), made.get("grpo.max_completion_length")
    if not isinstance(completion, int) or isinstance(completion, bool):
        return
    if isinstance(prompt, int):
        total = prompt + completion
        why = f"max_prompt_length {prompt} + max_completion_length {completion}"
        made.write("model.max_seq_length", total, why)
    elif completion >= 2048:
        why = f"max_completion_length {completion} + 1024 for the prompt, which had no limit"
        made.write("model.max_seq_length", completion + 1024, why)


def whole_batch(made: Translation, completions: int, why: str) -> None:
    """Set the batch to one optimizer step of ``completions``, which the sizer splits into
    micro-batches that fit the card.
    """
    made.write("grpo.generation_batch_size", completions, why)
    made.write("grpo.per_device_train_batch_size", "auto", "cut as the card allows; same gradient")
    made.write("grpo.gradient_accumulation_steps", "auto", "as above")


def split_warmup(made: Translation) -> None:
    """If warm-up is given both in steps and as a fraction, keep the steps, as transformers does."""
    steps, share = made.take("warmup_steps"), made.take("warmup_ratio")
    if steps and share:
        entry = steps["warmup_steps"]
        if isinstance(entry.value, (int, float)) and entry.value > 0:
            made.write("grpo.warmup_steps", entry.value, f"{entry.place}: warmup_steps")


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return type(value) is int and value > 0
