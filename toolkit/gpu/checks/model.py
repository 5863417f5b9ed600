"""Checks of the model's files: they are complete, readable, and supported by the sizer and vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import format_bytes, plural
from toolkit.gpu.checks.check import CheckContext, Outcome, fail, make_checks, ok, unknown, warn

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _model_folder(snapshot: NodeSnapshot, context: CheckContext) -> str | None:
    """Return the folder of the model's files; None if the job has no model or the files are not on
    this machine.
    """
    if context.model is None:
        return None
    location_facts = snapshot.model.location.value
    return (
        None
        if location_facts is None or location_facts["kind"] == "hub"
        else str(location_facts["path"])
    )


def location(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the model is a folder, is in the hub cache, or can be downloaded."""
    if context.model is None:
        return None
    reading = snapshot.model.location
    if reading.value is None:
        reason = str(reading.reason).removeprefix(f"{context.model}: ")
        return fail("user", f"model {context.model}: {reason}")
    if reading.value["kind"] != "hub":
        return ok(f"{reading.value['kind']} {reading.value['path']}")
    offline = [n for n in _OFFLINE if snapshot.environment.get(n, "0").lower() not in ("", "0")]
    revision = f" at {context.revision}" if context.revision else ""
    text = f"{context.model}{revision} is not in the hub cache"
    if offline:
        return fail("user", f"{text}, and {offline[0]} is set")
    return warn(f"{text}: the run will download it")


def weights(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that every weight file that the index lists exists, and that no link is broken."""
    path = _model_folder(snapshot, context)
    if path is None:
        return None
    files = snapshot.model.files
    if files.value is None:
        return fail("user", f"{path}: {files.reason}")
    file_facts = files.value
    for names, what in (
        (file_facts["missing_shards"], f"missing, named by {file_facts['index']}"),
        (file_facts["dangling"], "broken links"),
        (file_facts["unreadable"], "not readable"),
        (
            file_facts.get("irregular", []),
            "pipes or devices, not regular files",
        ),
        (file_facts["empty_weights"], "empty"),
    ):
        if names:
            more_text = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return fail("user", f"{path}: {', '.join(names[:3])}{more_text}: {what}")
    if not file_facts["weights"]:
        return fail("user", f"{path} contains no weights")
    return ok(
        f"{plural(file_facts['weights'], 'file')}, {format_bytes(file_facts['weight_bytes'])}"
    )


def config(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that config.json is readable and names an architecture."""
    path = _model_folder(snapshot, context)
    if path is None:
        return None
    reading = snapshot.model.config
    if reading.value is None:
        return fail("user", f"{path}: {reading.reason}")
    if not reading.value["architectures"]:
        return fail("user", f"{path}/config.json names no architecture")
    if reading.value["needs_code"]:
        return warn(
            f"{reading.value['architectures'][0]} may need code from the model's repository"
        )
    return ok(", ".join(reading.value["architectures"]))


def tokenizer(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the folder of the model contains a tokenizer."""
    path = _model_folder(snapshot, context)
    if path is None:
        return None
    reading = snapshot.model.tokenizer
    if reading.value is None:
        return unknown(f"{path}: {reading.reason}")
    if not reading.value:
        return fail("user", f"{path} contains no tokenizer (tokenizer.json, tokenizer.model ...)")
    return ok(", ".join(reading.value))


def architecture(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the sizer and the installed vLLM support the architecture of the model."""
    if _model_folder(snapshot, context) is None or snapshot.model.config.value is None:
        return None
    names = snapshot.model.config.value["architectures"]
    if not names:
        return None
    vllm_support = snapshot.model.vllm_knows
    if vllm_support.value is False and context.engine == "vllm":
        return fail("user", f"the installed vLLM does not support {names[0]}")
    if vllm_support.value is False:
        return warn(
            f"the installed vLLM does not support {names[0]}; only `runtime.engine: transformers` "
            "works"
        )
    model_type, supported_types = (
        snapshot.model.config.value["model_type"],
        context.sizer_model_types,
    )
    if supported_types is not None and model_type not in supported_types:
        return warn(
            f"the sizer supports {model_type or names[0]} only approximately, with a larger margin",
            "leave more memory free, or compare the prediction with the memory of a short run "
            "(`envcheck calibrate`)",
        )
    return ok(
        f"{names[0]} is supported"
        + ("" if vllm_support.has_value else " by the sizer; vLLM is not installed")
    )


_ROWS = (
    (
        "model.location",
        "The model is on this machine or can be downloaded",
        "A hub id is first searched in the hub cache. Without network access, the model must "
        "already be in the cache.",
        "download the model first (`hf download MODEL`), or correct `model_name` and `revision`",
        location,
    ),
    (
        "model.weights",
        "All weights are present",
        "After an interrupted download, weight files are missing or links are broken. Loading "
        "the model would fail after minutes.",
        "download the model again (`hf download MODEL`), or copy the missing files",
        weights,
    ),
    (
        "model.config",
        "config.json is readable",
        "The toolkit and vLLM read the shape of the model from config.json.",
        "download config.json from the model's page again",
        config,
    ),
    (
        "model.tokenizer",
        "There is a tokenizer",
        "Prompts cannot be encoded without a tokenizer.",
        "copy the tokenizer files of the base model into the folder",
        tokenizer,
    ),
    (
        "model.architecture",
        "The sizer and vLLM support the architecture",
        "vLLM runs only the architectures in its registry. The sizer is exact only for the "
        "architectures that it has rules for. For other architectures the sizer adds a margin.",
        "set `runtime.engine: transformers`, or use a model of a supported architecture",
        architecture,
    ),
)
CHECKS = make_checks(_ROWS)
