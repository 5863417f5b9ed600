"""Check the arguments of a command, then run the script of that name in this folder.

The scripts have no options. Each gets a fixed list of positional arguments. This module needs only
the standard library. Exit code 2 means a wrong command line. All other exit codes are those of the
scripts.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TARGETS = ("envcheck", "train-cpu", "train")
LOCKS = ("light", "cpu", "cu130", "build")


def parser() -> argparse.ArgumentParser:
    """Return the parser with all commands and their options."""
    top = argparse.ArgumentParser(prog="containers/cli.py", description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build one image, reproducibly")
    build.add_argument("target", choices=TARGETS)
    build.add_argument(
        "--stand-in", action="store_true", help="build on a base from the distribution's archive"
    )
    build.add_argument(
        "--engine",
        choices=("docker", "buildah"),
        help="container engine; default: docker if it is running, else buildah",
    )
    build.add_argument("--tag", help="name of the image; default: localhost/toolkit:TARGET")

    sif = commands.add_parser("sif", help="build a SIF of one target for Apptainer")
    sif.add_argument("target", nargs="?", choices=TARGETS, default="train-cpu")
    source = sif.add_mutually_exclusive_group()
    source.add_argument(
        "--from-image",
        dest="source",
        action="store_const",
        const="image",
        default="image",
        help="build from the image, which is built first if it is missing (default)",
    )
    source.add_argument(
        "--from-base",
        dest="source",
        action="store_const",
        const="base",
        help="build from the base, as on a cluster without a container engine",
    )
    sif.add_argument(
        "--stand-in", action="store_true", help="build on a base from the distribution's archive"
    )
    sif.add_argument(
        "--output",
        metavar="FILE",
        help="file to write; default: .setup/containers/toolkit-TARGET.sif",
    )

    lock = commands.add_parser("lock", help="refresh uv.lock and locks/*.txt from pyproject.toml")
    mode = lock.add_mutually_exclusive_group()
    mode.add_argument(
        "--check",
        dest="mode",
        action="store_const",
        const="check",
        default="lock",
        help="change nothing; exit 1 if a file differs",
    )
    mode.add_argument(
        "--upgrade",
        dest="mode",
        action="store_const",
        const="upgrade",
        help="lock the newest releases that pyproject.toml allows",
    )

    test = commands.add_parser("test", help="build the real images and the SIF and run them")
    test.add_argument(
        "--quick", action="store_true", help="test only the envcheck image, about two minutes"
    )

    sbom = commands.add_parser("sbom", help="write a CycloneDX bill of materials for each image")
    sbom.add_argument("folder", nargs="?", default=str(FOLDER.parent / "dist/sbom"))
    sbom.add_argument(
        "targets", nargs="*", metavar="target", help=f"images; default: {' '.join(TARGETS)}"
    )

    audit = commands.add_parser("audit", help="list known vulnerabilities in the locked packages")
    audit.add_argument(
        "locks", nargs="*", metavar="lock", help=f"locks to check; default: {' '.join(LOCKS)}"
    )
    return top


def script(words: list[str]) -> list[str]:
    """Return the path of the script for a command line, and its arguments.

    Raises:
        SystemExit: the command line is wrong (exit code 2).
    """
    top = parser()
    given, rest = top.parse_known_args(words)
    if rest and given.command != "test":  # `test` passes the rest to pytest
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command == "build":
        stand_in = "1" if given.stand_in else "0"
        values = [
            given.target,
            stand_in,
            given.engine or "",
            given.tag or f"localhost/toolkit:{given.target}",
        ]
    elif given.command == "sif":
        output = str(Path(given.output).absolute()) if given.output else ""
        values = [given.target, given.source, "1" if given.stand_in else "0", output]
    elif given.command == "lock":
        values = [given.mode]
    elif given.command == "test":
        values = ["image and not slow" if given.quick else "image", *rest]
    elif given.command == "sbom":
        for target in given.targets:
            if target not in TARGETS:
                top.error(f"there is no target {target}; the targets are {', '.join(TARGETS)}")
        values = [given.folder, *(given.targets or TARGETS)]
    else:
        values = given.locks or list(LOCKS)
    return [str(FOLDER / f"{given.command}.sh"), *values]


if __name__ == "__main__":
    command = ["bash", *script(sys.argv[1:])]
    os.execvp(command[0], command)
