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


def script_command(command_line: list[str]) -> list[str]:
    """Return the path of the script for a command line, and its arguments.

    Raises:
        SystemExit: the command line is wrong (exit code 2).
    """
    top = parser()
    options, extra_arguments = top.parse_known_args(command_line)
    if extra_arguments and options.command != "test":  # `test` passes the rest to pytest
        top.error(f"unrecognized arguments: {' '.join(extra_arguments)}")
    if options.command == "build":
        stand_in = "1" if options.stand_in else "0"
        values = [
            options.target,
            stand_in,
            options.engine or "",
            options.tag or f"localhost/toolkit:{options.target}",
        ]
    elif options.command == "sif":
        output = str(Path(options.output).absolute()) if options.output else ""
        values = [options.target, options.source, "1" if options.stand_in else "0", output]
    elif options.command == "lock":
        values = [options.mode]
    elif options.command == "test":
        values = ["image and not slow" if options.quick else "image", *extra_arguments]
    elif options.command == "sbom":
        for target in options.targets:
            if target not in TARGETS:
                top.error(f"there is no target {target}; the targets are {', '.join(TARGETS)}")
        values = [options.folder, *(options.targets or TARGETS)]
    else:
        values = options.locks or list(LOCKS)
    return [str(FOLDER / f"{options.command}.sh"), *values]


if __name__ == "__main__":
    command = ["bash", *script_command(sys.argv[1:])]
    os.execvp(command[0], command)
