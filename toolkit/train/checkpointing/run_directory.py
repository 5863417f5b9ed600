"""The run folder: made, held by one run at a time, and told what the run is."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, RetryError
from toolkit.base.paths import make_folder, write_file
from toolkit.base.secrets import redact_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

LOCK = ".lock"
FREE_TO_CHANGE = (
    "runtime",
    "source",
    # The digest of what was read speaks for these.
    "dataset.path",
    "dataset.eval_path",
    "reward.timeout_s",  # decides only what happens to a reward that hangs
    "reward.isolate",  # decides only where a reward is called
    "grpo.logging_steps",
    "grpo.save_steps",
    "grpo.save_strategy",
    "grpo.save_total_limit",
    "grpo.report_to",
    "grpo.run_name",
    "grpo.project",
    "grpo.trackio_space_id",
    "grpo.trackio_bucket_id",
    "grpo.trackio_static_space_id",
    # Exact to rounding, which the run says (run_context.introduce).
    "model.tensor_parallel_size",
)
"""What a resumed run may change without saying so: it changes no number that the run computes."""


PACK_TOKENS = "runtime.pack_tokens"


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[Path]:
    """The folder, made if need be, while no other process writes to it.

    Raises:
        ConfigError: it cannot be made or written.
        RetryError: another run holds it.
    """
    try:
        make_folder(run_dir)
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (OSError, FileExistsError) as problem:
        raise ConfigError(
            f"the output folder cannot be written: {problem.strerror}",
            where=str(run_dir),
            fix="name another runtime.output_dir (or --output-dir)",
        ) from problem
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        os.close(handle)
        raise RetryError(
            "another run is writing to this folder",
            where=str(run_dir),
            fix="wait for it to end, or name another runtime.output_dir",
        ) from problem
    try:
        yield run_dir
    finally:
        os.close(handle)


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """The run as plain JSON values, section by section, as config.json records it."""
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    sections.pop("source")
    return {name: _plain(value) for name, value in sections.items()}


def write_config(run_dir: Path, config: RunConfig) -> Path:
    """config.json: the resolved run, no secrets; it is itself a run file. Raises OSError."""
    text = json.dumps(redact_tree(as_mapping(config)), indent=2) + "\n"
    return write_file(run_dir / "config.json", text)


def fingerprint(config: RunConfig, data: Mapping[str, str]) -> dict[str, Any]:
    """What a resumed run must have in common with the one it resumes, one dotted key a value."""
    flat = {f"data.{name}": digest for name, digest in data.items()}
    _flatten(as_mapping(config), "", flat)
    tokens = flat[PACK_TOKENS]
    kept = (
        {} if tokens == "auto" else {PACK_TOKENS: tokens}
    )  # it decides in which order sums are made
    return kept | {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in FREE_TO_CHANGE)
    }


def _flatten(value: Any, path: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}" if path else key, into)
    else:
        into[path] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
