"""An image store for a test, with functions that build, run and inspect images in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

REPO = Path(__file__).resolve().parents[2]
CONTAINERS = REPO / "containers"
WORK = REPO / ".setup" / "containers"
# A host name in the pip settings of the build. No layer may contain it.
CANARY = "canary-host.invalid"
CACHE_OPTIONS = ("--tmpfs", "/cache:rw,mode=1777,size=2g")
USERS = ("0:0", "1000:1000", "4242:0", "54321:54321")
NEEDED = ("buildah", "podman", "skopeo", "runc", "mmdebstrap")


def copy_working_tree(folder: Path) -> Path:
    """Copy the current working tree with its git history. Two builds from the copy are equal, even
    if the working tree is edited or committed during the tests.
    """
    shutil.rmtree(folder, ignore_errors=True)
    git("clone", "--quiet", "--shared", "--no-checkout", str(REPO), str(folder))
    git("-C", str(folder), "reset", "--quiet")
    listed = git("-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    (folder / ".venv").symlink_to(REPO / ".venv")
    return folder


def wait_for_steps(process: subprocess.Popen[bytes], metrics: Path, log: Path) -> None:
    """Wait until a run has written two steps to ``metrics``; ``log`` has its output."""
    until = time.monotonic() + 400
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.5)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


@dataclass(frozen=True)
class Store:
    """A separate image store in ``folder``. Its images are built from the sources in ``tree``."""

    folder: Path
    tree: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "TOOLKIT_STORE": str(self.folder),
            "TOOLKIT_SETUP": str(WORK),
            "PIP_TRUSTED_HOST": CANARY,
        }

    def script(
        self, name: str, *arguments: str, project: Path | None = None, **variables: str
    ) -> tuple[int, str]:
        """Run a command of containers/cli.py and return (exit code, output)."""
        cli = [sys.executable, str((project or self.tree) / "containers/cli.py")]
        return self._run(*cli, name, *arguments, **variables)

    def stand_in(self, release: str) -> tuple[int, str]:
        """Make the stand-in base image for a release of Debian or Ubuntu in this store."""
        return self._run(str(self.tree / "containers/stand-in.sh"), release)

    def _run(self, *command: str, **variables: str) -> tuple[int, str]:
        result = subprocess.run(
            command,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.tree,
        )
        return result.returncode, result.stdout

    def build(self, target: str, *options: str) -> str:
        """Build a target and return its name."""
        code, output = self.script("build", target, "--engine", "buildah", *options)
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

    def podman(self, *arguments: str) -> list[str]:
        roots = ["--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run"]
        return ["podman", *roots, "--cgroup-manager=cgroupfs", "--runtime", "runc", *arguments]

    def command(self, image: str, user: str, *options: str) -> list[str]:
        """The words of `podman run` up to the name of the image: read-only, without network,
        capabilities or new privileges.
        """
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
        """Remove the store. Buildah removes containers and images first, because the mounts of the
        store would remain if only its files were deleted.
        """
        if self.folder.exists():
            for arguments in (("rm", "--all"), ("rmi", "--all", "--force")):
                self.buildah(*arguments)
            shutil.rmtree(self.folder, ignore_errors=True)


def build_layers(store: Store, image: str) -> Iterator[tarfile.TarFile]:
    """Each layer that the build made, without the layers of the base image."""
    folder = WORK / "layout"
    shutil.rmtree(folder, ignore_errors=True)
    store.buildah("push", "--quiet", "--disable-compression", image, f"oci:{folder}:x")
    blobs = folder / "blobs/sha256"
    index = json.loads((folder / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    history = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())["history"]
    # The history begins with the base image. The first step of the build installs base packages.
    filled = [entry for entry in history if not entry.get("empty_layer")]
    ours = next(i for i, entry in enumerate(filled) if "base-packages" in entry["created_by"])
    try:
        for layer in manifest["layers"][ours:]:
            with tarfile.open(blobs / layer["digest"][7:]) as archive:
                yield archive
    finally:
        shutil.rmtree(folder)


def assert_no_build_traces(store: Store, image: str) -> None:
    """No layer and no setting of the image contains a secret, a host name or a folder of the
    machine that built it.
    """
    secrets = {"the host of the index": CANARY.encode(), "the folder of the build": bytes(REPO)}
    certificate = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if certificate:
        secrets["the certificate"] = Path(certificate).read_bytes()[-400:]
    names = []
    for archive in build_layers(store, image):
        for member in archive:
            names.append(member.name)
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            with content:
                text = content.read()
            for what, secret in secrets.items():
                assert secret not in text, f"{member.name} contains {what}"
    assert len(names) > 500
    # Only the empty folders on which the secrets were mounted may remain.
    for trace in ("run/secrets/", "tmp/pip", "build/", "root/.cache", "mnt/", "etc/pip.conf"):
        assert not [name for name in names if name.startswith(trace)], trace
    inspected = json.dumps(store.inspect(image))
    assert CANARY not in inspected
    assert str(REPO) not in inspected.replace(str(store.folder), "")
