"""Remove the builder's random names from an image's configuration, so that two builds are equal.

buildah's docker format (the only one that can store a HEALTHCHECK) records the container of each
build step, its host name and the ids of the intermediate images. These values do not describe the
image, and Docker itself no longer writes them. This script needs only the standard library.

Usage: fixed_config.py INSPECTED FOLDER. INSPECTED is a file with the output of `buildah inspect
--type image`. FOLDER becomes a `dir:` image without layers. The layers remain in buildah's store,
where `skopeo copy` finds them. The script prints the total bytes of the layers.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

# Fields of the docker format with random names of the build.
BUILDER_FIELDS = ("container", "container_config", "parent")
INTERMEDIATE = re.compile(r"FROM [0-9a-f]{12}")


def without_builder_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` without the values in which two builds of the same files differ."""
    result = {name: value for name, value in config.items() if name not in BUILDER_FIELDS}
    result["config"] = {**config["config"], "Hostname": ""}
    result["history"] = [
        {
            name: value
            for name, value in entry.items()
            if not (name == "comment" and INTERMEDIATE.fullmatch(value))
        }
        for entry in config["history"]
    ]
    return result


def write_image(inspection: dict[str, Any], folder: Path) -> int:
    """Write manifest and configuration in the layout of `dir:`. Return the bytes of all layers."""
    content = json.dumps(
        without_builder_values(json.loads(inspection["Config"])), separators=(",", ":")
    ).encode()
    digest = hashlib.sha256(content).hexdigest()
    manifest = json.loads(inspection["Manifest"])
    manifest["config"] |= {"digest": f"sha256:{digest}", "size": len(content)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / digest).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    return sum(layer["size"] for layer in manifest["layers"])


if __name__ == "__main__":
    total = write_image(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    sys.stdout.write(f"{total}\n")
