"""Turn a command line and a run file into the arguments of the checks: a snapshot of the node, and
a CheckContext with the requirements of the job.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.base import process_environment
from toolkit.base.errors import InputError
from toolkit.base.files import read_bytes
from toolkit.base.formatting import GIB, KIB, MIB
from toolkit.base.hub_cache import hub_home

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.config.document import Document
    from toolkit.config.resolved import Situation
    from toolkit.config.run_config import RunConfig
    from toolkit.gpu.checks import CheckContext, CheckResult
    from toolkit.gpu.snapshot import NodeSnapshot

TRUST_REMOTE_CODE_OPTION = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Execute Python code of the model's checkpoint, if the run file also allows this.",
)


_AT_LEAST = re.compile(r"(cc|free|driver)\s*>=\s*([0-9]{1,9}(?:\.[0-9]{1,9})*)\s*([a-z]*)")
_UNITS = {"": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 1e3, "mb": 1e6, "gb": 1e9}


def check_node(
    *,
    config: Path | None,
    gpu_index: int | None,
    require: Sequence[str],
    lock: Path | None,
    overrides: Sequence[str] = (),
    node: bool = False,
    **selection: Sequence[str],
) -> tuple[NodeSnapshot, CheckContext, list[CheckResult]]:
    """Read this node, and run checks. Return the snapshot of the node, the context of the checks
    and their results. ``selection`` has the keywords ``only`` and ``skip`` of ``select_checks``,
    which select the checks.

    Raises:
        ConfigError: the run file has errors.
        InputError: a file is unreadable, a check is unknown, or a requirement has an unknown form.
    """
    from toolkit.gpu.checks import (  # noqa: PLC0415 - after parsing
        CheckContext,
        exit_code,
        run_checks,
        select_checks,
    )
    from toolkit.gpu.snapshot import take_snapshot  # noqa: PLC0415 - after parsing

    select_checks(**selection)  # reports a misspelt name before anything is read
    requirements = parse_requirements(require)
    if lock is not None:
        requirements["lock"] = read_lock(lock)
    document = run = None
    if overrides and config is None:
        raise InputError(
            "--set changes a run file, but no run file is given", fix="add `--config RUN.yaml`"
        )
    if config is not None:
        document, run = _load_run(config, overrides)
    model, revision = (run.model.model_name, run.model.revision) if run else (None, None)
    snapshot = take_snapshot(paths=run_folders(run, os.environ), model=model, revision=revision)
    situation = None
    if run is not None:
        situation = _node_situation(snapshot, gpu_index)
        requirements |= run_requirements(run, situation)
    context = CheckContext(gpu_index=gpu_index, node=node, **requirements)
    if context.lock:
        snapshot = with_locked_packages(snapshot, context.lock)
    results = run_checks(snapshot, context, **selection)
    if document is not None and not exit_code(results, node=node):
        from toolkit.config.validate import validated_config  # noqa: PLC0415 - only for a run file

        # The findings are reported after the checks. On a bad node, the missing GPU would otherwise
        # be reported as an error of the run file.
        validated_config(document, situation)
    return snapshot, context, results


def _load_run(path: Path, overrides: Sequence[str]) -> tuple[Document, RunConfig]:
    """Return the document of a run file and the run that it describes. The run file is validated
    without facts about a GPU.

    Raises the same errors as ``config.validate.validated_config``.
    """
    from toolkit.config.document_loader import load_document  # noqa: PLC0415 - only for a run file
    from toolkit.config.resolved import Situation  # noqa: PLC0415 - as above
    from toolkit.config.validate import validated_config  # noqa: PLC0415 - as above

    document = load_document(path, overrides)
    return document, validated_config(
        document, Situation(world_size=process_environment.world_size())
    )


def _node_situation(snapshot: NodeSnapshot, gpu_index: int | None) -> Situation:
    from toolkit.sizing.device import local_situation  # noqa: PLC0415 - only for a run file

    index = process_environment.local_rank() if gpu_index is None else gpu_index
    return local_situation(snapshot, gpu_index=index, world_size=process_environment.world_size())


def run_requirements(run: RunConfig, situation: Situation) -> dict[str, Any]:
    """Return the requirements that a run file has for a node, as arguments of CheckContext."""
    from toolkit.config.environments import describe_missing_packages  # noqa: PLC0415 - only for a run file
    from toolkit.config.resolved import resolve_run  # noqa: PLC0415 - as above
    from toolkit.sizing.families import FAMILIES  # noqa: PLC0415 - as above

    return {
        **resolve_run(run, situation).machine_requirements(),
        "world_size": process_environment.local_world_size(),
        "sizer_model_types": tuple(FAMILIES),
        "absent_packages": describe_missing_packages(run),
    }


def run_folders(run: RunConfig | None, environ: Mapping[str, str]) -> dict[str, Path]:
    """Return {role: folder} for the folders that a run writes to (roles: ``output_dir``,
    ``HF_HOME`` ...).
    """
    cache = Path(environ.get("XDG_CACHE_HOME") or "~/.cache")
    paths = {
        "HF_HOME": hub_home(environ),
        "VLLM_CACHE_ROOT": Path(environ.get("VLLM_CACHE_ROOT") or cache / "vllm"),
        "TRITON_CACHE_DIR": Path(environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"),
    }
    return paths if run is None else {"output_dir": Path(run.runtime.output_dir), **paths}


def parse_requirements(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``--require`` as arguments of CheckContext.

    The forms of a value are ``8``, ``gpu``, ``h200``, ``cc>=9.0``, ``free>=40GiB`` and
    ``driver>=580``. Raises InputError for any other form, and ConfigError for a card that is not in
    the table of cards.
    """
    from toolkit.gpu import cards  # noqa: PLC0415 - after parsing

    values: dict[str, Any] = {}
    for text in texts:
        match = _AT_LEAST.fullmatch(text.strip().lower())
        if text.strip().lower() == "gpu":
            values["required_gpus"] = max(1, values.get("required_gpus", 0))
        elif re.fullmatch(r"[0-9]{1,6}", text.strip()):
            values["required_gpus"] = int(text)
        elif match and match[1] == "driver" and not match[3]:
            values["required_driver"] = match[2]
        elif match and match[2].count(".") > 1:
            raise unknown_requirement_error(text)
        elif match and match[1] == "free" and match[3] in _UNITS:
            values["required_free_bytes"] = int(float(match[2]) * _UNITS[match[3]])
        elif match and match[1] == "cc" and not match[3]:
            major, _, minor = match[2].partition(".")
            values["required_capability"] = (int(major), int(minor or 0))
        elif re.search(r"[<>=]", text):
            raise unknown_requirement_error(text)
        else:
            cards.check_card_requirement(text)
            values["required_card"] = text
    return values


def unknown_requirement_error(text: str) -> InputError:
    """Return the error for a value of ``--require`` that has an unknown form."""
    return InputError(
        f"--require {text!r} has an unknown form",
        fix="use the number of GPUs (`2`), `gpu`, the name of a card (`h200`), or a condition "
        "(`cc>=9.0`, `free>=40GiB`, `driver>=580`)",
    )


def read_lock(path: Path) -> dict[str, str]:
    """Return {package: version} for the packages that a requirements file pins with
    ``name==version``.

    Hashes and markers are ignored. Raises InputError if the file pins no package.
    """
    pins = {}
    for line in read_bytes(path).decode(errors="replace").splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", line)
        if match:
            pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    if not pins:
        raise InputError(
            f"{path} has no name==version line", fix="use a requirements file with `==` pins"
        )
    return pins


def with_locked_packages(snapshot: NodeSnapshot, lock: Any) -> NodeSnapshot:
    """Return a copy of the snapshot that also contains the installed version of each package in
    ``lock``.
    """
    from dataclasses import replace  # noqa: PLC0415 - only with --lock

    from toolkit.gpu.reading import succeeded  # noqa: PLC0415 - only with --lock
    from toolkit.gpu.software import installed_version  # noqa: PLC0415 - only with --lock

    packages = {name: installed_version(name) for name in lock} | (
        snapshot.software.packages.value or {}
    )
    return replace(snapshot, software=replace(snapshot.software, packages=succeeded(packages)))
