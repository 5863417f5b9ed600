"""Create the file that ``envcheck record`` writes for a bug report. It contains all facts about a
node, but no names of persons or hosts.

Each UUID is replaced by an invented UUID, so that cards can still be distinguished. Each pid is
replaced by a small number. Names of processes, users and hosts are removed. Of the environment
variables, only those that checks read are in the file.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.version import __version__
from toolkit.gpu.checks import CheckContext, context_from_json, exit_code
from toolkit.gpu.report import SCHEMA_ID, utc_now
from toolkit.gpu.snapshot_json import node_from_json, node_to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.gpu.checks import CheckResult
    from toolkit.gpu.snapshot import NodeSnapshot

MAX_RECORDING_BYTES = 20_000_000
_UUID = re.compile(r"\b(MIG-GPU-|GPU-|MIG-)([0-9a-fA-F]{4}[0-9a-fA-F-]*)")
_FIXED_VALUES = {"SLURM_JOB_ID": "1"}


def make_recording(
    snapshot: NodeSnapshot, context: CheckContext, results: Sequence[CheckResult]
) -> dict[str, Any]:
    """Return the content of the file that ``envcheck record`` writes, without secrets and names.
    The key ``verdicts`` contains the results of the checks on this node. ``envcheck replay`` runs
    the checks again on the recorded facts, and compares its results with ``verdicts``.
    """
    data: dict[str, Any] = {
        "schema": SCHEMA_ID,
        "kind": "record",
        "toolkit_version": __version__,
        "time": utc_now(),
        "exit_code": exit_code(results),
        "context": replace(context, lock=None).to_json(),
        "node": node_to_json(snapshot),
        "verdicts": {
            result.id: result.verdict for result in results if result.id != _LOCK_CHECK_ID
        },
    }
    redacted: dict[str, Any] = redact(data, _secret_names())
    return redacted


# The user's lock file is not recorded, so ``replay`` cannot repeat this check.
_LOCK_CHECK_ID = "software.lock"


def _secret_names() -> dict[str, str]:
    """Return {name: replacement} for the names that must not leave this machine: home folder,
    account name, host name.
    """
    names = {str(Path.home()): "~"}
    with suppress(KeyError, OSError):  # a user id without an account
        names[getpass.getuser()] = "USER"
    host = socket.gethostname()
    names[host] = "HOST"
    names[host.partition(".")[0]] = "HOST"
    return {
        name: replacement for name, replacement in names.items() if len(name) > 1 and name != "root"
    }


def redact(data: object, names: dict[str, str]) -> Any:
    """Return a copy of ``data`` without secrets. ``names`` maps each secret name (of a folder, an
    account or a host) to its replacement. The secret names are replaced in all texts. UUIDs are
    replaced by invented UUIDs, pids by small numbers, and the names of processes by None.
    """
    pids: dict[int, int] = {}
    salt = os.urandom(16)

    def walk(value: object, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: walk(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [walk(part, key) for part in value]
        if key == "pid" and isinstance(value, int):
            return pids.setdefault(value, len(pids) + 1)
        if isinstance(value, str):
            return _FIXED_VALUES.get(key) or _replace_names(value, names, salt)
        return value

    without_names = _drop_process_names(data)
    return walk(without_names)


def _drop_process_names(value: object) -> Any:
    if isinstance(value, list):
        return [_drop_process_names(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "pid" in value and "name" in value:
        return {**value, "name": None}
    return {name: _drop_process_names(part) for name, part in value.items()}


def _replace_names(text: str, names: dict[str, str], salt: bytes) -> str:
    text = _UUID.sub(lambda match: match[1] + _invented_uuid(match[2].lower(), salt), text)
    text = re.sub(r"\buid \d+", "uid N", text)
    for name, replacement in names.items():
        if name.startswith("/"):
            text = re.sub(rf"{re.escape(name)}(?=/|$|[:;,\s])", replacement, text)
        else:
            # A text may contain the host with a domain that gethostname does not return.
            domain = r"(?:\.[\w-]+)*" if replacement == "HOST" else ""
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}{domain}(?![\w.-])", replacement, text)
    return text


def _invented_uuid(uuid: str, salt: bytes) -> str:
    """Return an invented UUID for ``uuid``. Each digit is shifted by an amount that depends on the
    salt and on the digits before it.

    Thus different UUIDs stay different, and a prefix of a UUID becomes a prefix of the invented
    UUID (CUDA_VISIBLE_DEVICES may contain a prefix). The salt is not saved, so that nobody can find
    the original UUID by trying all digits.
    """
    shifted = []
    for position, digit in enumerate(uuid):
        shift = hashlib.sha256(salt + uuid[:position].encode()).digest()[0]
        shifted.append("-" if digit == "-" else f"{(int(digit, 16) + shift) % 16:x}")
    return "".join(shifted)


def parse_recording(data: object) -> tuple[NodeSnapshot, CheckContext, dict[str, str]]:
    """Return the node, the requirements of the job and the verdicts from ``data``, a recording that
    ``make_recording`` created.

    Raises InputError if ``data`` is not a recording of this format.
    """
    try:
        if not isinstance(data, dict) or data.get("kind") != "record":
            raise ValueError("must be an object with kind: record")
        verdicts = data.get("verdicts", {})
        if not isinstance(verdicts, dict):
            raise ValueError("verdicts must be an object")
        return node_from_json(data["node"]), context_from_json(data.get("context", {})), verdicts
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"not a recording: {error}", fix="create a recording with `envcheck record FILE`"
        ) from None
