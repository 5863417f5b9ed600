"""Create the run folder, lock it for one run at a time, and write config.json into it."""

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
from toolkit.config.run_paths import LOCK_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

CHANGEABLE_KEYS = (
    "runtime",
    "source",
    # The digests of the data are compared instead of these paths.
    "dataset.path",
    "dataset.eval_path",
    "reward.timeout_s",  # only limits the time of a reward function
    "reward.isolate",  # only selects the process in which a reward function runs
    "grpo.ddp_timeout",
    "grpo.disable_tqdm",
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
    # Results may differ by rounding, which run_context.print_run_description reports.
    "model.tensor_parallel_size",
)
"""Keys that may differ when a run is resumed, because they do not change any number that the run
computes.
"""


PACK_TOKENS = "runtime.pack_tokens"


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[Path]:
    """Create the folder if needed, and lock it against other processes that write to it.

    Raises:
        ConfigError: the folder cannot be created or written.
        RetryError: another run has locked it.
    """
    try:
        make_folder(run_dir)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(run_dir / LOCK_FILE, flags, 0o644)
    except (OSError, ValueError) as problem:  # ValueError: a NUL character in the path
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise ConfigError(
            f"the output folder cannot be written: {reason}",
            where=str(run_dir),
            fix="set another runtime.output_dir (or --output-dir)",
        ) from problem
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        os.close(handle)
        raise RetryError(
            "another run is writing to this folder",
            where=str(run_dir),
            fix="wait for the other run to end, or set another runtime.output_dir",
        ) from problem
    try:
        yield run_dir
    finally:
        os.close(handle)


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """Return the sections of ``config`` by name, as JSON values. config.json has this content."""
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    sections.pop("source")
    # A run without an environment or tools has no such section.
    return {name: _to_json_values(value) for name, value in sections.items() if value is not None}


def write_config(run_dir: Path, config: RunConfig) -> Path:
    """Write config.json, the resolved run without secrets. This file is also a valid run file.
    Raises OSError.
    """
    text = json.dumps(redact_tree(as_mapping(config)), indent=2) + "\n"
    return write_file(run_dir / "config.json", text)


def fingerprint(config: RunConfig, data: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that must not change when a run is resumed, by dotted key. ``data`` has the
    digest of each split.
    """
    flat = {f"data.{name}": digest for name, digest in data.items()}
    _flatten(as_mapping(config), "", flat)
    tokens = flat[PACK_TOKENS]
    # The number of tokens per pass changes the order of sums, so it must not change.
    pack_tokens = {} if tokens == "auto" else {PACK_TOKENS: tokens}
    return pack_tokens | {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE_KEYS)
    }


def _flatten(value: object, path: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}" if path else key, into)
    else:
        into[path] = value


def _to_json_values(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_json_values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_values(item) for item in value]
    return value
