"""Write an image's own manifest, and refuse to when its lock does not serve pyproject.toml.

Runs inside the build, with the Python of the environment that it describes. A run's manifest.json
records the file that this writes (``TOOLKIT_IMAGE_MANIFEST``), so a result can be traced to an
image whose tag has long moved on. Standard library only.
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
# Target -> the extra that it serves, the lock files that made it, in the order of installation.
TARGETS = {
    "envcheck": (None, ("light.txt",)),
    "train-cpu": ("cpu-engine", ("image-torch.txt", "cpu.txt")),
    "train": ("cuda", ("cu130.txt",)),
}


def normalize(name: str) -> str:
    """A project's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Every installed package but ours: normalized name -> version."""
    found = {normalize(d.metadata["Name"]): d.version for d in metadata.distributions()}
    found.pop(PROJECT, None)
    return dict(sorted(found.items()))


def locked(path: Path) -> dict[str, set[str]]:
    """What a lock file names: normalized name -> versions (several where a marker decides)."""
    pins: dict[str, set[str]] = {}
    for match in re.finditer(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE):
        pins.setdefault(normalize(match[1]), set()).add(match[2])
    return pins


def key(version: str) -> tuple[int, ...]:
    """The release numbers of a version; our pins have no use for the local part (+cpu)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def satisfies(version: str, specifier: str) -> bool:
    """``version`` against what pyproject.toml uses: ``==``, ``>=``, ``<=``, ``<``, ``>``, comma."""
    width = 6
    have = (key(version) + (0,) * width)[:width]
    for clause in filter(None, specifier.replace(" ", "").split(",")):
        match = re.fullmatch(r"(==|>=|<=|<|>)([0-9][0-9.]*)", clause)
        if match is None:
            raise SystemExit(f"image_manifest: cannot read the requirement {clause!r}")
        want = (key(match[2]) + (0,) * width)[:width]
        verdicts = {
            "==": have == want,
            ">=": have >= want,
            "<=": have <= want,
            "<": have < want,
            ">": have > want,
        }
        if not verdicts[match[1]]:
            return False
    return True


def wanted(requirements: list[str], extra: str | None) -> dict[str, list[str]]:
    """What the project asks for with ``extra`` and the extras it names: name -> specifiers."""
    asked: dict[str, list[str]] = {}
    todo: list[str | None] = [None, *([extra] if extra else [])]
    seen: set[str | None] = set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for requirement in requirements:
            body, _, marker = (part.strip() for part in requirement.partition(";"))
            at = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
            if (normalize(at[1]) if at else None) != current:
                continue
            match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*\(?([^)]*)\)?", body)
            if match is None:
                raise SystemExit(f"image_manifest: cannot read the requirement {requirement!r}")
            if normalize(match[1]) == PROJECT:
                todo.extend(normalize(name.strip()) for name in (match[2] or "").split(","))
            else:
                asked.setdefault(normalize(match[1]), []).append(match[3])
    return asked


def faults(target: str, locks: Path, have: dict[str, str]) -> list[str]:
    """Every way in which lock, environment and pyproject.toml disagree; empty when they agree."""
    extra, files = TARGETS[target]
    pins: dict[str, set[str]] = {}
    for name in files:
        for package, versions in locked(locks / name).items():
            pins.setdefault(package, set()).update(versions)
    found = []
    for package, specifiers in wanted(metadata.requires(PROJECT) or [], extra).items():
        version = have.get(package)
        for specifier in specifiers:
            if version is None:
                found.append(
                    f"pyproject.toml wants {package}{specifier}, the lock has no {package}"
                )
            elif not satisfies(version, specifier):
                found.append(
                    f"pyproject.toml wants {package}{specifier}, the lock has {package}=={version}"
                )
    found += [
        f"{package} {version} is installed and not locked"
        for package, version in have.items()
        if version not in pins.get(package, set())
    ]
    return sorted(set(found))


def digest(files: list[Path]) -> str:
    """One SHA-256 over lock files, in order, each as its bytes."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.read_bytes())
    return f"sha256:{total.hexdigest()}"


def main(argv: list[str] | None = None) -> int:
    """Check, then write. Exit 1 when the lock must be refreshed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--locks", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--revision", default="unknown")
    parser.add_argument("--base", default="unknown")
    parser.add_argument("--source-date-epoch", type=int, default=0)
    options = parser.parse_args(argv)
    have = installed()
    wrong = faults(options.target, options.locks, have)
    if wrong:
        lines = ["error: the lock does not match pyproject.toml", *(f"  {line}" for line in wrong)]
        lines.append("  fix: run `just lock`, look at what moved, commit it")
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
        "lock": {"files": [f"locks/{path.name}" for path in files], "digest": digest(files)},
        "packages": have,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
