"""A store of images for a test, and what one does with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONTAINERS = REPO / "containers"
WORK = REPO / ".setup" / "containers"
# What a build on this machine may know and no layer may show: planted in the settings of pip.
CANARY = "canary-host.invalid"
CACHE_OPTIONS = ("--tmpfs", "/cache:rw,mode=1777,size=2g")
USERS = ("0:0", "1000:1000", "4242:0", "54321:54321")
NEEDED = ("buildah", "podman", "skopeo", "runc", "mmdebstrap")


@dataclass(frozen=True)
class Store:
    """A store of images of its own, and what one does with it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "TOOLKIT_STORE": str(self.folder),
            "PIP_TRUSTED_HOST": CANARY,
        }

    def script(self, name: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Run a script of containers/: (exit code, what it printed)."""
        result = subprocess.run(
            ["bash", str(CONTAINERS / name), *arguments],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPO,
        )
        return result.returncode, result.stdout

    def build(self, target: str, *options: str) -> str:
        """Build a target and return its name."""
        code, output = self.script("build.sh", target, "--engine", "buildah", *options)
        assert code == 0, output
        print(output)
        return f"localhost/toolkit:{target}"

    def buildah(self, *arguments: str) -> str:
        roots = ["--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run"]
        return subprocess.run(
            ["buildah", *roots, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def inspect(self, image: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.buildah("inspect", "--type", "image", image))
        return found

    def digest(self, image: str) -> str:
        return str(self.inspect(image)["FromImageDigest"])

    def labels(self, image: str) -> object:
        """The OCI labels, the revision among them."""
        return json.loads(self.buildah("inspect", "--type", "image", image))["OCIv1"]["config"][
            "Labels"
        ]

    def podman(self, *arguments: str) -> list[str]:
        roots = ["--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run"]
        return ["podman", *roots, "--cgroup-manager=cgroupfs", "--runtime", "runc", *arguments]

    def command(self, image: str, user: str, *options: str) -> list[str]:
        """`podman run` with everything closed, up to the image's name; the command follows."""
        return self.podman(
            *("run", "--rm", "--no-healthcheck"),
            *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
            *("--network", "none", "--read-only", "--read-only-tmpfs=false"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--user", user),
            *options,
            image,
        )

    def run(
        self,
        image: str,
        user: str,
        *command: str,
        options: tuple[str, ...] = CACHE_OPTIONS,
        timeout: int = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in an image to its end."""
        return subprocess.run(
            [*self.command(image, user, *options), *command],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def remove(self) -> None:
        """Images and containers first: a store's mounts outlive a deletion of its files."""
        if self.folder.exists():
            for arguments in (("rm", "--all"), ("rmi", "--all", "--force")):
                self.buildah(*arguments)
            shutil.rmtree(self.folder, ignore_errors=True)
