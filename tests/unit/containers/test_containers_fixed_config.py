"""The values of the docker format that describe the build are removed from an image. All other
values stay.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[3] / "containers/fixed_config.py"


def inspect_output(word: str) -> dict[str, str]:
    """The output of `buildah inspect --type image`. ``word`` is random in each build."""
    config = {
        "created": "2026-01-01T00:00:00Z",
        "container": word * 4,
        "container_config": {"Hostname": word},
        "parent": f"sha256:{word * 4}",
        "config": {
            "Hostname": word,
            "User": "1000:1000",
            "Healthcheck": {"Test": ["CMD", "toolkit-health"]},
        },
        "history": [
            {"created_by": "a base's own step", "comment": "debuerreotype 0.16"},
            {"created_by": "/bin/sh -c #(nop) USER 1000:1000", "comment": f"FROM {word[:12]}"},
            {"created_by": "/bin/sh -c true", "comment": "FROM localhost/base:latest"},
        ],
        "rootfs": {"type": "layers", "diff_ids": ["sha256:1", "sha256:2"]},
    }
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": "application/x", "size": 1, "digest": f"sha256:{word}"},
        "layers": [{"digest": "sha256:1", "size": 1000}, {"digest": "sha256:2", "size": 234}],
    }
    return {"Config": json.dumps(config), "Manifest": json.dumps(manifest)}


def run_script(folder: Path, word: str) -> tuple[bytes, dict[str, Any], str]:
    """Return (configuration, manifest, stdout)."""
    (folder / f"{word}.json").write_text(json.dumps(inspect_output(word)))
    command = [sys.executable, str(SCRIPT), str(folder / f"{word}.json"), str(folder / word)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    manifest = json.loads((folder / word / "manifest.json").read_text())
    config = (folder / word / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes()
    return config, manifest, printed


def test_two_builds_give_equal_images_and_other_fields_stay(tmp_path: Path) -> None:
    config, manifest, printed = run_script(tmp_path, "0123456789abcdef")
    assert (config, manifest, printed) == run_script(tmp_path, "fedcba9876543210")
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(config).hexdigest()}"
    assert manifest["config"]["size"] == len(config)
    assert printed == "1234\n"
    kept = json.loads(config)
    assert kept["config"]["Healthcheck"] == {"Test": ["CMD", "toolkit-health"]}
    assert kept["config"]["User"] == "1000:1000"
    assert [entry.get("comment") for entry in kept["history"]] == [
        "debuerreotype 0.16",
        None,
        "FROM localhost/base:latest",
    ]
    assert kept.keys() == {"created", "config", "history", "rootfs"}
