"""Write manifest.json: the facts that are needed to repeat the run. It contains no secrets, no host
name and no user name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.paths import write_file
from toolkit.base.secrets import redact_tree
from toolkit.base.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.gpu.snapshot import NodeSnapshot

SCHEMA_VERSION = 1
IMAGE_DIGEST_VARIABLE = "TOOLKIT_IMAGE_DIGEST"
IMAGE_DIGEST_FILE = Path("/etc/toolkit-image-digest")
IMAGE_MANIFEST_VARIABLE = "TOOLKIT_IMAGE_MANIFEST"
IMAGE_KEYS = ("target", "version", "revision", "base", "lock")
LOCK_FILES = ("uv.lock", "locks/cpu.txt", "locks/cu130.txt")


def packages() -> dict[str, str]:
    """The version of every installed Python package, by name."""
    versions = {
        d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]
    }
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def lock_hashes() -> dict[str, str]:
    """The sha256 of each lock file in the source checkout of this package. Empty if the package was
    installed from a wheel.
    """
    root = Path(__file__).resolve().parents[2]
    return {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in LOCK_FILES
        if (root / name).is_file()
    }


def image_digest() -> str | None:
    """The digest of the container image, from an environment variable or a file. None if both are
    missing.
    """
    if value := os.environ.get(IMAGE_DIGEST_VARIABLE):
        return value
    try:
        return IMAGE_DIGEST_FILE.read_text().strip() or None
    except OSError:
        return None


def image() -> dict[str, Any] | None:
    """Facts about the container image, for example its version and its base image. None outside a
    container.

    containers/image_manifest.py writes them into the image.
    """
    try:
        facts = json.loads(Path(os.environ[IMAGE_MANIFEST_VARIABLE]).read_text())
        return {key: facts[key] for key in IMAGE_KEYS}
    except (KeyError, TypeError, OSError, ValueError):
        return None


def git_revision(folder: Path) -> dict[str, Any] | None:
    """The git commit of ``folder``, and whether tracked files differ from this commit. None if
    ``folder`` is not in a git repository.
    """

    def run_git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    revision = run_git("rev-parse", "HEAD")
    if not revision:
        return None
    return {"revision": revision, "modified": bool(run_git("status", "--porcelain", "-uno"))}


def gpus(snapshot: NodeSnapshot | None) -> list[dict[str, Any]]:
    """The name and the UUID of each visible GPU.

    A value that the driver does not report is None.
    """
    visible_gpus = snapshot.gpus if snapshot is not None else ()
    return [{"name": gpu.name.value, "uuid": gpu.uuid.value} for gpu in visible_gpus]


def write_manifest(
    run_dir: Path,
    *,
    seeds: Mapping[str, int],
    data: Mapping[str, str],
    world_size: int,
    source: str | None,
    snapshot: NodeSnapshot | None,
) -> Path:
    """Write manifest.json and return its path.

    ``source`` is the run file. The manifest records the git commit of the run file's folder. Raises
    OSError.
    """
    folder = Path(source).resolve().parent if source else Path.cwd()
    driver = snapshot.driver.version.value if snapshot is not None else None
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "toolkit": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "lock_sha256": lock_hashes(),
        "image_digest": image_digest(),
        "image": image(),
        "git": git_revision(folder),
        "driver": driver,
        "gpus": gpus(snapshot),
        "data_sha256": dict(data),
        "seeds": dict(seeds),
        "world_size": world_size,
        "cpu_threads": _cpu_threads(),
    }
    return _write_manifest(run_dir, manifest)


def add_entries(run_dir: Path, **entries: Any) -> Path:
    """Add ``entries`` to the existing manifest. Raises OSError."""
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    return _write_manifest(run_dir, {**manifest, **entries})


def _write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> Path:
    text = json.dumps(redact_tree(manifest), indent=2, default=str) + "\n"
    return write_file(run_dir / "manifest.json", text)


def _cpu_threads() -> int | None:
    """The number of CPU threads that torch uses for one operation. None if torch is not imported.

    Results on the CPU are reproducible only with the same number of threads.
    """
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None
