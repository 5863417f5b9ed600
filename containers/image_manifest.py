"""Write an image's manifest, or report an error if its lock does not match pyproject.toml.

This script runs inside the build, with the Python of the environment that it describes. A run's
manifest.json records the content of the image's manifest (``TOOLKIT_IMAGE_MANIFEST``). So a result
can be traced to its image, even if the tag now names another image. Needs only the standard
library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PROJECT = "grpo-toolkit"
# For each target: its extra in pyproject.toml, and its lock files in the order of installation.
TARGETS = {
    "envcheck": (None, ("light.txt",)),
    "train-cpu": ("cpu-engine", ("image-torch.txt", "cpu.txt")),
    "train": ("cuda", ("cu130.txt",)),
}


def normalize(name: str) -> str:
    """Return a project's name in the normalized form that indexes compare (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_packages() -> dict[str, str]:
    """Return every installed package except the toolkit: normalized name -> version."""
    versions = {normalize(d.metadata["Name"]): d.version for d in metadata.distributions()}
    versions.pop(PROJECT, None)
    return dict(sorted(versions.items()))


def read_lock(path: Path) -> dict[str, set[str]]:
    """Return the packages of a lock file: normalized name -> versions (several if a marker chooses
    one of them).
    """
    pins: dict[str, set[str]] = {}
    for match in re.finditer(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE):
        pins.setdefault(normalize(match[1]), set()).add(match[2])
    return pins


def release_numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version, without the local part (+cpu)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def satisfies(version: str, specifier: str) -> bool:
    """Whether ``version`` meets ``specifier``. The operators are those that pyproject.toml uses:
    ``==``, ``>=``, ``<=``, ``<``, ``>``, separated by commas.

    Raises:
        SystemExit: a clause of the specifier has another form.
    """
    width = 6
    version_numbers = (release_numbers(version) + (0,) * width)[:width]
    for clause in filter(None, specifier.replace(" ", "").split(",")):
        match = re.fullmatch(r"(==|>=|<=|<|>)([0-9][0-9.]*)", clause)
        if match is None:
            raise SystemExit(
                f"image_manifest: pyproject.toml: unknown form of requirement: {clause!r}"
            )
        clause_numbers = (release_numbers(match[2]) + (0,) * width)[:width]
        comparisons = {
            "==": version_numbers == clause_numbers,
            ">=": version_numbers >= clause_numbers,
            "<=": version_numbers <= clause_numbers,
            "<": version_numbers < clause_numbers,
            ">": version_numbers > clause_numbers,
        }
        if not comparisons[match[1]]:
            return False
    return True


def required_packages(requirements: list[str], extra: str | None) -> dict[str, list[str]]:
    """Return the requirements of the project with ``extra``, and with the extras that it includes:
    name -> specifiers.

    Raises:
        SystemExit: a requirement has an unknown form.
    """
    specifiers: dict[str, list[str]] = {}
    pending_extras: list[str | None] = [None, *([extra] if extra else [])]
    seen: set[str | None] = set()
    while pending_extras:
        current = pending_extras.pop()
        if current in seen:
            continue
        seen.add(current)
        for requirement in requirements:
            body, _, marker = (part.strip() for part in requirement.partition(";"))
            extra_match = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
            if (normalize(extra_match[1]) if extra_match else None) != current:
                continue
            match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*\(?([^)]*)\)?", body)
            if match is None:
                raise SystemExit(
                    f"image_manifest: pyproject.toml: unknown form of requirement: {requirement!r}"
                )
            if normalize(match[1]) == PROJECT:
                pending_extras.extend(
                    normalize(name.strip()) for name in (match[2] or "").split(",")
                )
            else:
                specifiers.setdefault(normalize(match[1]), []).append(match[3])
    return specifiers


def find_mismatches(target: str, locks: Path, installed: dict[str, str]) -> list[str]:
    """Return one text for each difference between lock, environment and pyproject.toml."""
    extra, files = TARGETS[target]
    pins: dict[str, set[str]] = {}
    for name in files:
        for package, versions in read_lock(locks / name).items():
            pins.setdefault(package, set()).update(versions)
    mismatches = []
    for package, specifiers in required_packages(metadata.requires(PROJECT) or [], extra).items():
        version = installed.get(package)
        for specifier in specifiers:
            if version is None:
                mismatches.append(
                    f"pyproject.toml requires {package}{specifier}, but the lock has no {package}"
                )
            elif not satisfies(version, specifier):
                mismatches.append(
                    f"pyproject.toml requires {package}{specifier}, but the lock has "
                    f"{package}=={version}"
                )
    mismatches += [
        f"{package} {version} is installed, but it is not in the lock"
        for package, version in installed.items()
        if version not in pins.get(package, set())
    ]
    return sorted(set(mismatches))


def lock_digest(files: list[Path]) -> str:
    """Return one SHA-256 over the bytes of all lock files, in the given order."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.read_bytes())
    return f"sha256:{total.hexdigest()}"


def main(argv: list[str] | None = None) -> int:
    """Check the lock, then write the manifest. Return 1 if the lock must be refreshed, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--locks", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--revision", default="unknown")
    parser.add_argument("--base", default="unknown")
    parser.add_argument("--source-date-epoch", type=int, default=0)
    options = parser.parse_args(argv)
    packages = installed_packages()
    mismatches = find_mismatches(options.target, options.locks, packages)
    if mismatches:
        lines = [
            "error: the lock does not match pyproject.toml",
            *(f"  {line}" for line in mismatches),
        ]
        lines.append("  fix: run `just lock`, check the changes, and commit them")
        sys.stderr.write("\n".join(lines) + "\n")
        return 1
    files = [options.locks / name for name in TARGETS[options.target][1]]
    content = {
        "schema_version": 1,
        "target": options.target,
        "version": metadata.version(PROJECT),
        "revision": options.revision,
        "base": options.base,
        "python": platform.python_version(),
        "source_date_epoch": options.source_date_epoch,
        "lock": {"files": [f"locks/{path.name}" for path in files], "digest": lock_digest(files)},
        "packages": packages,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
