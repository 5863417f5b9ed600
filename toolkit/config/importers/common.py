"""Functions that convert values, shared by several formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.mapping import Unfit

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

NO_ADAPTER = "a run of this toolkit trains a LoRA adapter (section lora), not all weights"


def dtype(value: Any) -> str | None:
    """Return the name of a torch dtype; None if ``value`` leaves the choice to the checkpoint or
    the GPU. Raises Unfit for other dtypes.
    """
    if value in (None, "auto", ""):
        return None
    name = str(value).removeprefix("torch.")
    known = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    name = known.get(name, name)
    if name not in ("bfloat16", "float16", "float32"):
        raise Unfit("model.dtype must be bfloat16, float16, float32 or auto")
    return name


_SAME = object()


def renamed(value: Any, names: dict[str, Any], other: Any = _SAME) -> Any:
    """Return ``names[value]``. If ``names`` does not contain ``value``, return ``other`` if given,
    else ``value`` unchanged.
    """
    if isinstance(value, str) and value in names:
        return names[value]
    return value if other is _SAME else other


def as_integer(value: Any) -> Any:
    """Return a whole float such as ``16.0`` as an integer, and any other value unchanged. Some
    tools write integers as floats.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def positive(value: Any) -> Any:
    """Return a count unchanged (whole floats as integers). Return None for -1, 0 and null, which
    mean "no limit" in some tools.
    """
    if value is None or (isinstance(value, (int, float)) and value <= 0):
        return None
    return as_integer(value)


def targets(value: Any) -> Any:
    """Convert target modules: return "all-linear" for ["all-linear"], and any other value
    unchanged.
    """
    return "all-linear" if value == ["all-linear"] else value


def module_function(name: str) -> str:
    """Return ``package.module.function`` as ``package.module:function``. Raises Unfit for other
    names.
    """
    head, _, last = name.rpartition(".")
    if not head or not all(part.isidentifier() for part in name.split(".")):
        raise Unfit("the name does not have the form module.function")
    return f"{head}:{last}"


def from_file(path: Any, name: Any) -> str:
    """Return a function in a Python file as ``module:function``, without the folder of the file.
    Raises Unfit if the file's name is not a module name.
    """
    stem = str(path).replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    if not stem.isidentifier():
        raise Unfit(f"{stem} cannot be the name of a Python module")
    return f"{stem}:{name}"


def fit_length(made: Translation) -> None:
    """Set model.max_seq_length to the sum of the maximum lengths of prompt and completion. If only
    the maximum length of the completion is known, add 1024 tokens for the prompt, but only if the
    completion alone would fill the default model.max_seq_length. Do nothing if the key is already
    set.
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
        why = f"max_completion_length {completion} + 1024 for the prompt, which has no limit"
        made.write("model.max_seq_length", completion + 1024, why)


def whole_batch(made: Translation, completions: int, why: str) -> None:
    """Set the batch keys so that one optimizer step uses ``completions`` completions. The sizes of
    the micro-batches are set to "auto", so that the toolkit chooses sizes that fit the GPU.
    """
    made.write("grpo.generation_batch_size", completions, why)
    made.write(
        "grpo.per_device_train_batch_size",
        "auto",
        "the toolkit chooses a size that fits the GPU; the gradient is the same",
    )
    made.write("grpo.gradient_accumulation_steps", "auto", "see per_device_train_batch_size")


def split_warmup(made: Translation) -> None:
    """If warm-up is given both in steps and as a fraction, use the steps, as transformers does."""
    steps, share = made.take("warmup_steps"), made.take("warmup_ratio")
    if steps and share:
        entry = steps["warmup_steps"]
        if isinstance(entry.value, (int, float)) and entry.value > 0:
            made.write("grpo.warmup_steps", entry.value, f"{entry.place}: warmup_steps")


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return type(value) is int and value > 0
