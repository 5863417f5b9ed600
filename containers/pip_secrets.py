"""Write the pip settings of this machine that an image build needs: DIR/pip.conf, DIR/ca.crt and
DIR/wheels/.

Paths of this machine do not exist inside a build, so they are left out. Wheels that are not on the
public index (torch's CPU build) are copied to DIR/wheels/. The build gets all these files as
secrets and bind mounts, so that no layer contains them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

FORWARDED_OPTIONS = {"index-url", "extra-index-url", "trusted-host", "proxy", "timeout"}


def pip_settings() -> list[tuple[str, str]]:
    """Return (option, value) pairs from pip's files and variables, in the order in which pip merges
    them. A later pair has priority.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    pairs = (line.partition("=") for line in listing.splitlines())
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return [(name.rpartition(".")[2], value.strip().strip("'")) for name, _, value in ordered]


def split_words(value: str) -> list[str]:
    """Split a setting into its words. `pip config list` prints line breaks as ``\\n``."""
    return [word for word in re.split(r"\s+|\\n", value) if word]


def write_secrets(folder: Path, locks: Path) -> None:
    """Write pip.conf, ca.crt and wheels/ to ``folder``. ``image-torch.txt`` of ``locks`` names the
    torch release of the wheels.
    """
    forwarded: dict[str, str] = {}
    links: list[str] = []
    for option, value in pip_settings():
        if option == "find-links":
            links += split_words(value)
        remote = [word for word in split_words(value) if not word.startswith(("file:", "/"))]
        if option in FORWARDED_OPTIONS and remote:
            forwarded[option] = " ".join(remote)
    lines = "".join(f"{option} = {value}\n" for option, value in forwarded.items())
    (folder / "pip.conf").write_text(f"[global]\n{lines}")
    certificate = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    (folder / "ca.crt").write_bytes(Path(certificate).read_bytes() if certificate else b"")
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    pin = re.search(r"^torch==(\S+)", (locks / "image-torch.txt").read_text(), re.MULTILINE)
    assert pin is not None
    for link in dict.fromkeys(links):
        for wheel in Path(link).glob(f"torch-{pin[1]}-*.whl"):
            shutil.copy(wheel, wheels)


if __name__ == "__main__":
    write_secrets(Path(sys.argv[1]), Path(__file__).resolve().parent.parent / "locks")
