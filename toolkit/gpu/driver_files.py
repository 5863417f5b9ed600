"""Read facts about the driver from the file system: which libcuda is loaded, the device files, and
the kernel's log.

No library is loaded: the version of a library is read from its file name, and the loader's cache is
parsed as bytes. All paths start at ``root``, so that tests can use a folder in place of a node's
file system.
"""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.gpu.reading import Reading, failed, succeeded, unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path("/")
_DEFAULT_FOLDERS = ("lib64", "usr/lib64", "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu")
_WSL_FOLDER = "usr/lib/wsl/lib"
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
_SXID = re.compile(r"SXid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
_LOG_BYTES = 4_000_000
_LOG_SECONDS = 0.5


def read(environ: Mapping[str, str], root: Path = ROOT) -> dict[str, Reading[Any]]:
    """Return {field: reading} for the fields of ``DriverSnapshot`` that come from files."""
    return {
        "kernel_module": as_reading(lambda: kernel_module(root)),
        "libcuda": as_reading(lambda: libcuda(environ, root)),
        "device_nodes": as_reading(lambda: device_nodes(root)),
        "pci_gpus": as_reading(lambda: pci_gpus(root)),
        "kernel_log": kernel_log(root),
        "mps": as_reading(lambda: is_mps_running(environ, root)),
    }


def as_reading(read_value: Callable[[], Any]) -> Reading[Any]:
    """Call ``read_value``, a function that reads files, and return its result as a Reading. If a
    file does not exist, the Reading is "not supported". After any other OSError or ValueError, the
    Reading is "failed".
    """
    try:
        return succeeded(read_value())
    except FileNotFoundError as error:
        return unsupported(f"{error.filename}: does not exist")
    except (OSError, ValueError) as error:
        return failed(getattr(error, "strerror", None) or str(error))


def kernel_module(root: Path = ROOT) -> str:
    """Return the version of the driver's loaded kernel module.

    Raises:
        OSError: the module is not loaded.
        ValueError: the file with the version has an unknown form.
    """
    text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"(?:Kernel Module|for \S+)\s+(\d+\.\d+(?:\.\d+)?)", text)
    if match is None:
        raise ValueError("/proc/driver/nvidia/version has an unknown form")
    return match[1]


def libcuda(environ: Mapping[str, str], root: Path = ROOT) -> list[dict[str, Any]]:
    """Return {path, version, source} for every libcuda.so.1 on the loader's search path. ``source``
    says where the folder comes from (LD_LIBRARY_PATH, ld.so.cache or the default folders). The
    loader loads the first one.
    """
    libraries: dict[Path, dict[str, Any]] = {}
    for path, target, source in shared_library("libcuda.so.1", environ, root):
        version = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)$", target.name)
        entry = {"path": str(path), "version": version[1] if version else None, "source": source}
        libraries.setdefault(target, entry)
    return list(libraries.values())


def shared_library(
    name: str, environ: Mapping[str, str], root: Path = ROOT
) -> Iterator[tuple[Path, Path, str]]:
    """Find the files named ``name`` on the loader's search path. Yield (path, path with all links
    resolved, source of the folder) for each file, in the order of the search path.
    """
    search_path = [
        ("LD_LIBRARY_PATH", Path(folder))
        for folder in environ.get("LD_LIBRARY_PATH", "").split(":")
        if folder
    ]
    search_path += [("ld.so.cache", path.parent) for path in _loader_cache_paths(name, root)]
    search_path += [("default", Path("/") / folder) for folder in (*_DEFAULT_FOLDERS, _WSL_FOLDER)]
    for source, folder in search_path:
        path = root / folder.relative_to("/") if folder.is_absolute() else folder
        try:
            yield folder / name, (path / name).resolve(strict=True), source
        except (OSError, RuntimeError):  # absent, or a loop of links
            continue


def _loader_cache_paths(name: str, root: Path) -> list[Path]:
    """Return the paths of the library ``name`` in the loader's cache (``ld.so.cache``). The cache
    contains the paths as NUL-terminated strings.
    """
    try:
        data = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return []
    paths = re.findall(rb"(/[\x21-\x7e]+/" + re.escape(name.encode()) + rb")\0", data)
    paths_64_bit = [path for path in paths if b"i386" not in path and b"lib32" not in path]
    return [Path(path.decode()) for path in dict.fromkeys(paths_64_bit)]


def device_nodes(root: Path = ROOT) -> list[dict[str, Any]]:
    """Return {path, usable} for each NVIDIA device file. ``usable`` is true if this user can open
    the file for reading and writing.
    """
    names = [
        name
        for name in os.listdir(root / "dev")
        if re.fullmatch(r"nvidia(ctl|-uvm|\d+)|dxg|nvgpu", name)
    ]
    return [
        {"path": f"/dev/{name}", "usable": os.access(root / "dev" / name, os.R_OK | os.W_OK)}
        for name in sorted(names)
    ]


def pci_gpus(root: Path = ROOT) -> int:
    """Return the number of NVIDIA display controllers on the PCI bus, with or without a driver."""
    count = 0
    for device in (root / "sys/bus/pci/devices").iterdir():
        try:
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def is_mps_running(environ: Mapping[str, str], root: Path = ROOT) -> bool:
    """Whether a daemon of MPS (NVIDIA's Multi-Process Service) serves CUDA programs on this
    node.
    """
    pipe = environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # CUDA's default
    return (root / pipe.lstrip("/") / "control").exists()


def kernel_log(root: Path = ROOT) -> Reading[list[dict[str, Any]]]:
    """Return the XID and SXID events since boot, each with its number, bus id, and age in seconds
    if known. XID events are faults that the NVIDIA driver reports; SXID events are faults of an
    NVSwitch.
    """
    try:
        return succeeded(_read_events(root / "dev/kmsg"))
    except OSError as error:
        reason = error.strerror or str(error)
    for name in ("var/log/kern.log", "var/log/messages"):
        try:
            with (root / name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _LOG_BYTES))
                text = file.read(_LOG_BYTES).decode("utf-8", errors="replace")
        except OSError:
            continue
        return succeeded([event for line in text.splitlines() if (event := _parse_event(line))])
    return failed(f"/dev/kmsg: {reason}")


def _read_events(kmsg: Path) -> list[dict[str, Any]]:
    """Return the XID and SXID events in the kernel's ring buffer. Each call of ``os.read`` returns
    one record. The function returns when there is no further record, or after a time limit.
    """
    descriptor = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK)
    events, deadline = [], time.monotonic() + _LOG_SECONDS
    now_us = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
    try:
        while time.monotonic() < deadline:
            try:
                record = os.read(descriptor, 8192)
            except BlockingIOError:
                break
            except OSError as error:
                # the record was overwritten: continue with the next one
                if error.errno == errno.EPIPE:
                    continue
                raise
            if not record:
                break
            head, _, text = record.decode("utf-8", errors="replace").partition(";")
            event = _parse_event(text)
            if event:
                stamp = head.split(",")[2] if head.count(",") >= 2 else ""
                if stamp.isdecimal():
                    event["age_s"] = round(max(0.0, now_us - int(stamp)) / 1e6)
                events.append(event)
    finally:
        os.close(descriptor)
    return events


def _parse_event(line: str) -> dict[str, Any] | None:
    if "Non-fatal" in line:  # NVSwitch also writes such events, but corrects the errors itself
        return None
    for kind, pattern in (("xid", _XID), ("sxid", _SXID)):
        match = pattern.search(line)
        if match:
            return {"kind": kind, "number": int(match[2]), "bus": match[1], "age_s": None}
    return None
