"""Define the methods with which notebooks save a trained model.

The methods write merged weights to disk or to the hub. For GGUF files they only give instructions.
``policy.model_attributes`` sets the methods on each model.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from toolkit.base.errors import ConfigValueError, UnsupportedError
from toolkit.base.paths import set_modes
from toolkit.policy.adapter_io import save_lora
from toolkit.policy.hub_upload import push_folder
from toolkit.policy.merged_export import check_empty, merge_adapter, write_model
from toolkit.policy.saved_adapter import read_adapter

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint

SAVE_METHODS = ("merged_16bit", "lora")
CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
"""The types of GGUF files that llama.cpp's converter writes. Files of other types are made from one
of these with ``llama-quantize``.
"""
UNSLOTH_TYPES = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
"""A mapping from Unsloth's names of GGUF types to llama.cpp's names."""


class ModelSource(NamedTuple):
    """The origin of a model: the checkpoint of its base model, and the call that loaded it."""

    checkpoint: Checkpoint
    request: LoadRequest

    @classmethod
    def without_token(cls, checkpoint: Checkpoint, request: LoadRequest) -> ModelSource:
        """Return the origin of a model, without the hub token. The model stores its origin, and may
        be copied and pickled. So the origin must not contain a secret, and must consist of plain
        values.
        """
        return cls(checkpoint, replace(request, token=None, engine=dict(request.engine)))


def save_pretrained_merged(  # noqa: PLR0913 - the drop-in signature
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    push_to_hub: bool = False,
    token: str | None = None,
    private: bool | None = None,
) -> Path:
    """Write ``model`` to the folder ``save_directory``, which must be empty or not exist. Returns
    the folder.

    ``save_method`` selects what is written. "merged_16bit" writes the base model with the adapter
    merged into it, in 16 bits, in the format that transformers and vLLM load. "lora" writes only
    the adapter. If ``tokenizer`` is None, the model's own tokenizer is written. With
    ``push_to_hub`` the folder is also uploaded, to the repository with the name ``save_directory``.

    Raises:
        ConfigValueError: the method is unknown, the folder is not empty, or the model has no
            adapter.
        UnsupportedError: the method is "merged_4bit".
        InputError: a file cannot be read or written.
    """
    _check_method(save_method)
    target = Path(save_directory)
    tokenizer = tokenizer if tokenizer is not None else model.toolkit_tokenizer
    check_empty(target)
    if getattr(model, "toolkit_full_finetuning", False):
        write_model(model, tokenizer, target)
    elif save_method == "lora":
        save_lora(model, target)
        tokenizer.save_pretrained(str(target))
    else:
        _write_merged(model, tokenizer, target)
    set_modes(target)
    if push_to_hub:
        push_folder(target, str(save_directory), token=token, private=private)
    return target


def push_to_hub_merged(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """Write the same files as ``save_pretrained_merged``, but to the repository ``repo_id`` on the
    hub. Returns the address of the repository.

    Raises the errors of ``save_pretrained_merged`` and ``hub_upload.push_folder``.
    """
    _check_method(save_method)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained_merged(model, Path(scratch) / "model", tokenizer, save_method)
        return push_folder(folder, repo_id, token=token, private=private)


def save_pretrained_gguf(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: Any = "fast_quantized",
    **kwargs: Any,
) -> NoReturn:
    """Raise UnsupportedError, because only llama.cpp's converter writes GGUF files. The error's fix
    lists the commands to run.
    """
    del model, tokenizer, kwargs
    raise UnsupportedError(
        "this package does not write GGUF files: llama.cpp's converter makes them from a folder of "
        "merged weights",
        where="save_pretrained_gguf",
        fix=gguf_recipe(str(save_directory), _gguf_types(quantization_method)),
    )


def push_to_hub_gguf(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: Any = "fast_quantized",
    **kwargs: Any,
) -> NoReturn:
    """Raise UnsupportedError, as ``save_pretrained_gguf`` does. The error's fix lists the commands
    to run.
    """
    del kwargs
    save_pretrained_gguf(model, repo_id.rpartition("/")[2], tokenizer, quantization_method)


def gguf_recipe(folder: str, types: list[str]) -> str:
    """Return the commands that write merged weights to ``folder`` and convert them to GGUF files of
    the given ``types``.
    """
    steps = [f"call model.save_pretrained_merged({folder!r}, tokenizer), then run in a shell:"]
    converted_type = next((gguf_type for gguf_type in types if gguf_type in CONVERTER_TYPES), "f16")
    steps += [
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {folder}/{gguf_type}.gguf"
        f" --outtype {gguf_type}"
        for gguf_type in dict.fromkeys(
            [converted_type, *(gguf_type for gguf_type in types if gguf_type in CONVERTER_TYPES)]
        )
    ]
    steps += [
        f"llama.cpp/build/bin/llama-quantize {folder}/{converted_type}.gguf "
        f"{folder}/{gguf_type}.gguf {gguf_type}"
        for gguf_type in types
        if gguf_type not in CONVERTER_TYPES
    ]
    return "\n    ".join(steps)


def _gguf_types(requested: Any) -> list[str]:
    names = [requested] if isinstance(requested, str) or requested is None else list(requested)
    return [
        UNSLOTH_TYPES.get(str(name or "q8_0").lower(), str(name or "q8_0").lower())
        for name in names
    ]


def _check_method(method: str) -> None:
    if method in SAVE_METHODS:
        return
    if str(method).startswith("merged_4bit"):
        raise UnsupportedError(
            f"save_method={method!r} is not supported, because weights that are merged and then "
            "quantized again differ from the trained model",
            where="save_method",
            fix='use save_method="merged_16bit", and quantize when the model is loaded for serving',
        )
    raise ConfigValueError(
        f"save_method={method!r} must be one of {', '.join(SAVE_METHODS)}",
        where="save_pretrained_merged",
        fix='use "merged_16bit" to save the whole model, or "lora" to save only the adapter',
    )


def _write_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    source: ModelSource | None = getattr(model, "toolkit_source", None)
    if source is None:
        raise ConfigValueError(
            "the checkpoint that this model was loaded from is unknown",
            where="save_pretrained_merged",
            fix="load the model with FastLanguageModel.from_pretrained",
        )
    half_dtype = "float16" if str(model.dtype) == "torch.float16" else "bfloat16"
    with tempfile.TemporaryDirectory() as scratch:
        adapter = read_adapter(save_lora(model, Path(scratch) / "adapter"))
        merge_adapter(source.checkpoint, adapter, source.request, target, dtype=half_dtype)
    # The user's tokenizer may have its own chat template.
    tokenizer.save_pretrained(str(target))
