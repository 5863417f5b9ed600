"""One bad member and the archive is refused before anything has been written."""

from __future__ import annotations

import io
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest

from toolkit.base.archives import is_archive, unpack
from toolkit.base.errors import ConfigError, InputError, ToolkitError

if TYPE_CHECKING:
    from pathlib import Path


def _tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def _zip(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("make", [_tar, _zip])
def test_what_is_clean_is_unpacked(tmp_path: Path, make) -> None:
    name = "a.zip" if make is _zip else "a.tar.gz"
    archive = make(tmp_path / name, ("data/x.txt", b"x"), ("y.txt", b"y"))
    into = unpack(archive, tmp_path / "into")
    assert is_archive(archive)
    assert (into / "data/x.txt").read_bytes() == b"x"
    assert (into / "y.txt").read_bytes() == b"y"


@pytest.mark.parametrize("make", [_tar, _zip])
@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_a_member_that_leads_outside_spoils_the_whole(tmp_path: Path, make, name: str) -> None:
    archive = make(tmp_path / "a", ("good", b"x"), (name, b"evil"))
    with pytest.raises(ConfigError, match="a member leads outside its folder") as caught:
        unpack(archive, tmp_path / "into")
    assert caught.value.where == str(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "member",
    [
        _special("link", tarfile.SYMTYPE, "/etc/passwd"),
        _special("link", tarfile.LNKTYPE, "/etc/passwd"),
        _special("device", tarfile.CHRTYPE),
        _special("pipe", tarfile.FIFOTYPE),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    archive = _tar(tmp_path / "a", member, ("link/x", b"x"))
    with pytest.raises(ConfigError, match="holds a link or a device"):
        unpack(archive, tmp_path / "into")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        zipped.writestr(info, "/etc/passwd")
    with pytest.raises(ConfigError, match="holds a link or a device"):
        unpack(archive, tmp_path / "into")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", ("zeros", bytes(5_000_000)))
    assert archive.stat().st_size < 10_000
    with pytest.raises(ConfigError, match=r"unpacks to more than 1\.0 MiB"):
        unpack(archive, tmp_path / "into", limit_bytes=1 << 20)


def test_the_same_member_twice_is_refused(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "a.tar", ("x", b"1"), ("./x", b"2"))
    with pytest.raises(ConfigError, match="twice"):
        unpack(archive, tmp_path / "into")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "a.tar", ("x", b"1"))
    with pytest.raises(ConfigError, match="not empty"):
        unpack(archive, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 torn"])
def test_no_archive_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError):
        unpack(tmp_path / "a.zip", tmp_path / "into")


def test_a_torn_archive_is_unreadable_not_a_crash(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "a.tgz", ("x", bytes(range(256)) * 1000)).read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "torn.tgz").write_bytes(whole[:size])
        with pytest.raises(ToolkitError):
            unpack(tmp_path / "torn.tgz", tmp_path / f"into{size}")


def test_a_member_that_does_not_decompress_is_no_crash(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", ("x", bytes(range(256)) * 100))
    damaged = bytearray(archive.read_bytes())
    damaged[33:60] = b"\xff" * 27  # what follows the header of 30 bytes and the name
    archive.write_bytes(damaged)
    with pytest.raises(InputError, match="not a readable archive: Error -3 while decompressing"):
        unpack(archive, tmp_path / "into")


def test_a_member_with_a_password_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", ("x", b"1"))
    damaged = bytearray(archive.read_bytes())
    for flags in (6, damaged.index(b"PK\x01\x02") + 8):  # in both headers
        damaged[flags] |= 1
    archive.write_bytes(damaged)
    with pytest.raises(ConfigError, match="the member 'x' is encrypted"):
        unpack(archive, tmp_path / "into")


@pytest.mark.parametrize("name", ["long" * 100, "file/in/a/file"])
def test_a_member_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    archive = _tar(tmp_path / "a.tar", ("file", b"1"), (name, b"2"))
    with pytest.raises(InputError, match=f"the member '{name}' cannot be unpacked") as caught:
        unpack(archive, tmp_path / "into")
    assert caught.value.where == str(archive)
    assert str(tmp_path / "into") not in str(caught.value)
