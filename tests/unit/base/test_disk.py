"""A disk failure has the same message and exit code for every library that reports it."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from toolkit.base import disk_errors
from toolkit.base.errors import ConfigError, NodeError

if TYPE_CHECKING:
    from pathlib import Path


class RustError(Exception):
    """An exception like those of safetensors and tokenizers."""


def caused(outer: Exception, cause: Exception, *, by: str = "cause") -> Exception:
    setattr(outer, f"__{by}__", cause)
    return outer


def full_disk(name=None):
    return OSError(errno.ENOSPC, "No space left on device", name)


@pytest.mark.parametrize(
    ("error", "kind", "expected_text"),
    [
        (full_disk("/tmp/x"), ConfigError, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ConfigError, "the disk is full (Disk quota"),
        (OSError(errno.EROFS, "Read-only file system"), ConfigError, "cannot write: Read-only"),
        (OSError(errno.EIO, "Input/output error"), NodeError, "the disk failed"),
        (OSError(errno.ESTALE, "Stale file handle"), NodeError, "the disk failed: Stale"),
        (OSError(errno.EFBIG, "File too large"), ConfigError, "would be larger than the limit"),
        (RustError("I/O error: File too large (os error 27)"), ConfigError, "(ulimit -f)"),
        (RustError("Error while serializing: I/O error: No space left on device (os error 28)"),
         ConfigError, "the disk is full"),
        (RustError("Read-only file system (os error 30)"), ConfigError, "cannot write"),
        (RustError("Disk quota exceeded (os error 122)"), ConfigError, "the disk is full"),
        (RustError("Input/output error (os error 5)"), NodeError,
         "the disk failed: Input/output error"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left"),
         ConfigError, "the disk is full"),
        (caused(RuntimeError("PytorchStreamWriter failed writing file data/0"), full_disk(),
                 by="context"), ConfigError, "the disk is full"),
        (caused(RuntimeError("could not save"), full_disk()), ConfigError, "the disk is full"),
    ],
)  # fmt: skip
def test_a_failure_of_every_writer_has_the_same_message(tmp_path, error, kind, expected_text):
    failure = disk_errors.to_toolkit_error(error, tmp_path)
    assert type(failure) is kind
    assert failure.exit_code == {ConfigError: 1, NodeError: 3}[kind]
    assert expected_text in failure.message
    assert " (file system /" in failure.where
    assert failure.fix


def test_a_writer_without_an_error_number_is_explained_by_the_free_space(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed")
    assert isinstance(disk_errors.to_toolkit_error(error, tmp_path), NodeError)
    monkeypatch.setattr(disk_errors, "free_bytes", lambda _: 1000)
    failure = disk_errors.to_toolkit_error(error, tmp_path, needed=3000)
    assert "2.9 KiB needed, 1000 B free, 2.0 KiB missing" in failure.message


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RuntimeError("shapes do not match"),
        RustError("Permission denied (os error 13)"),
        caused(KeyError("x"), full_disk(), by="context"),
        OSError(errno.ENOENT, "No such file or directory"),
    ],
)
def test_an_error_that_is_not_a_disk_failure_is_not_translated(tmp_path, error):
    assert disk_errors.to_toolkit_error(error, tmp_path) is None
    assert disk_errors.to_toolkit_error_without_path(error) is None


def test_a_full_disk_is_recognised_without_a_path():
    failure = disk_errors.to_toolkit_error_without_path(full_disk("/proc/self/none"))
    assert "the disk is full" in failure.message
    assert "checkpoint" not in failure.message
    assert (
        disk_errors.to_toolkit_error_without_path(OSError(errno.EACCES, "Permission denied"))
        is None
    )


@pytest.fixture
def tiny_disk(tmp_path: Path):
    mount_point = tmp_path / "a tiny disk"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


def test_real_writers_on_a_real_full_disk(tiny_disk):
    """The installed safetensors, torch, tokenizers and Arrow write to a full disk."""
    import pyarrow as pa
    import torch
    from pyarrow import parquet
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    tensor = torch.zeros(1 << 18)
    words = {f"word{n}": n for n in range(20000)}
    table = pa.table({"x": os.urandom(1 << 20).hex().split("0")})
    writers = {
        "safetensors": lambda p: save_file({"t": tensor}, p),
        "torch": lambda p: torch.save(tensor, p),
        "tokenizers": lambda p: Tokenizer(models.WordLevel(words, "word0")).save(p),
        "arrow": lambda p: parquet.write_table(table, p),
    }
    for name, write in writers.items():
        file = tiny_disk / name
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each library raises its own class
            write(str(file))
        failure = disk_errors.to_toolkit_error(caught.value, file, needed=1 << 20)
        assert isinstance(failure, ConfigError), (name, caught.value)
        assert "the disk is full (No space left on device): 1.0 MiB needed" in failure.message, name
        assert "missing" in failure.message, name
        assert f"(file system {tiny_disk}, tmpfs)" in failure.where
        file.unlink(missing_ok=True)
