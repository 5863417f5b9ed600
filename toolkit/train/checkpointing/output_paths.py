"""Before training, find objects in a run folder that prevent the run from writing its files.

A link may point outside of the folder, and a write to a pipe waits for a reader. A folder in place
of a file (or a file in place of a folder) would cause an error only after the training.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError, InputError
from toolkit.base.files import file_type_fault, read_json_object
from toolkit.train.checkpointing.branch import BRANCH_FILE
from toolkit.train.report.metrics_log import LOG_FILES, TOOL_LOG_FILES
from toolkit.train.rewards.error_policy import BAD_REWARDS_FILE
from toolkit.train.tracking import tracker_names
from toolkit.train.tracking.to_mlflow import FOLDER as MLFLOW
from toolkit.train.tracking.to_tensorboard import FOLDER as TENSORBOARD

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig

OUTPUT_FOLDERS = ("adapter", "model")
"""Folders that a run writes at its end, with files inside."""
FILES_IN_FOLDERS = ("adapter_config.json", "adapter_model.safetensors", "base.json", "README.md")
TRACKER_FOLDERS = {"tensorboard": TENSORBOARD, "mlflow": MLFLOW, "wandb": "wandb"}
"""Folders in the run folder that the package of a tracker writes."""
APPENDED_FILES = (*LOG_FILES, *TOOL_LOG_FILES, BAD_REWARDS_FILE)
REPLACED_FILES = (
    BRANCH_FILE,
    "config.json",
    "evaluation.json",
    "manifest.json",
    "memory.json",
    "preflight.json",
    "report.html",
    "trackers.json",
)
"""Files that are written under a temporary name and renamed. The new file replaces a file or a link
with its name. Any other object with its name prevents the write.
"""


def check_output_paths(run_dir: Path, config: RunConfig | None = None) -> None:
    """Reject a run folder if the run of ``config`` could not write one of its files there. For
    example, a pipe or a folder may have the name of that file. The folders of the run's trackers
    are checked too. The run folder is also rejected if the run would replace a file or a folder
    that it reads, or a config.json that no run wrote (for example that of a model).

    Raises:
        ConfigError: the message names the first path with such a problem.
    """
    for name in OUTPUT_FOLDERS:
        _check_folder(run_dir / name)
    for tracker in [] if config is None else tracker_names(config.grpo.get("report_to")):
        if tracker in TRACKER_FOLDERS:
            _check_folder(run_dir / TRACKER_FOLDERS[tracker])
    for name in APPENDED_FILES:
        mode = _mode(run_dir / name)
        if mode is not None and not stat.S_ISREG(mode):
            raise _obstacle_error(run_dir / name, _describe_kind(mode), "a file")
    for name in REPLACED_FILES:
        _check_replaceable(run_dir / name)
    if config is not None:
        _refuse_inputs(run_dir.resolve(), config)
    if not (run_dir / BRANCH_FILE).exists():
        _refuse_other_config(run_dir / "config.json")


def _refuse_inputs(run_dir: Path, config: RunConfig) -> None:
    inputs = {
        "the run file": config.source,
        "model.model_name": config.model.model_name,
        "lora.adapter_path": config.lora.adapter_path,
        "dataset.path": config.dataset.path,
        "dataset.eval_path": config.dataset.eval_path,
    }
    if (run_dir / BRANCH_FILE).exists():
        # The config.json of a run is a run file, too: it may be given to resume the run.
        del inputs["the run file"]
    outputs = {run_dir / name for name in (*OUTPUT_FOLDERS, *APPENDED_FILES, *REPLACED_FILES)} | {
        run_dir
    }
    for key, text in inputs.items():
        path = Path(text) if text else None
        if path is None or not path.exists():
            continue
        if {path.parent.resolve() / path.name, path.resolve()} & outputs:
            raise ConfigError(
                f"the run reads this path ({key}), but would overwrite it or files in it",
                where=str(path),
                fix="set another folder with --output-dir",
            )


def _refuse_other_config(path: Path) -> None:
    """Raise ConfigError if the file ``path`` exists, but is not the config.json of a run. A
    link is always accepted, because the run replaces only the link and not its target.
    """
    mode = _mode(path)
    if mode is None or stat.S_ISLNK(mode):
        return
    try:
        is_run_config = read_json_object(path).keys() >= {"model", "grpo"}
    except InputError:
        is_run_config = False
    if not is_run_config:
        raise ConfigError(
            "no run wrote this file, but the run would replace it",
            where=str(path),
            fix="set another folder with --output-dir, or rename the file",
        )


def _check_folder(path: Path) -> None:
    mode = _mode(path)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise _obstacle_error(path, _describe_kind(mode), "a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise _obstacle_error(
            path, "is a folder that this user cannot write to", "files in a folder"
        )
    for name in FILES_IN_FOLDERS:
        _check_replaceable(path / name)


def _check_replaceable(path: Path) -> None:
    mode = _mode(path)
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise _obstacle_error(path, _describe_kind(mode), "a file")


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None


def _describe_kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "is a link"
    return "is a file" if stat.S_ISREG(mode) else file_type_fault(mode) or "is not a regular file"


def _obstacle_error(path: Path, found_kind: str, expected: str) -> ConfigError:
    return ConfigError(
        f"the path {found_kind}, but the run writes {expected} with this name",
        where=str(path),
        fix="remove or rename this path, or set another folder with --output-dir",
    )
