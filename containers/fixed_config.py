"""Take the builder's random names out of an image's configuration, so that one build is as another.

buildah's docker format (the one with a place for the HEALTHCHECK) records the container that each
step ran in, its host name and the ids of the images between. None of it describes the image, and
Docker itself no longer writes it. Standard library only.

Usage: fixed_config.py INSPECTED FOLDER; INSPECTED is what `buildah inspect --type image` prints.
FOLDER becomes a `dir:` image without layers: those stay in the store, where a copy finds them.
Prints how many bytes the layers have.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

# Fields of the docker format that hold names made up for the build.
OF_THE_BUILDER = ("container", "container_config", "parent")
INTERMEDIATE = re.compile(r"FROM [0-9a-f]{12}")


def fixed(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without what two builds of the same files differ in."""
    kept = {name: value for name, value in config.items() if name not in OF_THE_BUILDER}
    kept["config"] = {**config["config"], "Hostname": ""}
    kept["history"] = [
        {
            name: value
            for name, value in entry.items()
            if not (name == "comment" and INTERMEDIATE.fullmatch(value))
        }
        for entry in config["history"]
    ]
    return kept


def write(inspected: dict[str, Any], folder: Path) -> int:
    """Write manifest and configuration in the layout of `dir:`; returns the layers' bytes."""
    content = json.dumps(fixed(json.loads(inspected["Config"])), separators=(",", ":")).encode()
    digest = hashlib.sha256(content).hexdigest()
    manifest = json.loads(inspected["Manifest"])
    manifest["config"] |= {"digest": f"sha256:{digest}", "size": len(content)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / digest).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    return sum(layer["size"] for layer in manifest["layers"])


if __name__ == "__main__":
    total = write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    sys.stdout.write(f"{total}\n")
