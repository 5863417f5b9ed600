"""An archive with one bad member is refused before anything is written."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import time
import zipfile
from typing import TYPE_CHECKING

import pytest

from toolkit.base.archives import is_archive, unpack
from toolkit.base.errors import ConfigError, InputError, ToolkitError

if TYPE_CHECKING:
    from pathlib import Path


def write_tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_zip(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def special_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_a_valid_archive_is_unpacked(tmp_path: Path, make) -> None:
    name = "a.zip" if make is write_zip else "a.tar.gz"
    archive = make(tmp_path / name, ("data/x.txt", b"x"), ("y.txt", b"y"))
    into = unpack(archive, tmp_path / "into")
    assert is_archive(archive)
    assert (into / "data/x.txt").read_bytes() == b"x"
    assert (into / "y.txt").read_bytes() == b"y"


@pytest.mark.parametrize("make", [write_tar, write_zip])
@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_a_member_outside_the_folder_refuses_the_whole_archive(
    tmp_path: Path, make, name: str
) -> None:
    archive = make(tmp_path / "a", ("good", b"x"), (name, b"evil"))
    with pytest.raises(ConfigError, match="a member leads outside its folder") as caught:
        unpack(archive, tmp_path / "into")
    assert caught.value.where == str(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "member",
    [
        special_member("link", tarfile.SYMTYPE, "/etc/passwd"),
        special_member("link", tarfile.LNKTYPE, "/etc/passwd"),
        special_member("device", tarfile.CHRTYPE),
        special_member("pipe", tarfile.FIFOTYPE),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    archive = write_tar(tmp_path / "a", member, ("link/x", b"x"))
    with pytest.raises(ConfigError, match="contains a link or a device"):
        unpack(archive, tmp_path / "into")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        zipped.writestr(info, "/etc/passwd")
    with pytest.raises(ConfigError, match="contains a link or a device"):
        unpack(archive, tmp_path / "into")


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", ("zeros", bytes(5_000_000)))
    assert archive.stat().st_size < 10_000
    with pytest.raises(ConfigError, match=r"unpacks to more than 1\.0 MiB"):
        unpack(archive, tmp_path / "into", limit_bytes=1 << 20)


def test_the_same_member_twice_is_refused(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", ("x", b"1"), ("./x", b"2"))
    with pytest.raises(ConfigError, match="twice"):
        unpack(archive, tmp_path / "into")


def test_a_target_folder_with_files_is_refused(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", ("x", b"1"))
    with pytest.raises(ConfigError, match="not empty"):
        unpack(archive, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 torn"])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError):
        unpack(tmp_path / "a.zip", tmp_path / "into")


def test_a_truncated_archive_is_an_input_error(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tgz", ("x", bytes(range(256)) * 1000)).read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "torn.tgz").write_bytes(whole[:size])
        with pytest.raises(ToolkitError):
            unpack(tmp_path / "torn.tgz", tmp_path / f"into{size}")


def test_a_corrupt_member_is_an_input_error(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", ("x", bytes(range(256)) * 100))
    damaged = bytearray(archive.read_bytes())
    damaged[33:60] = b"\xff" * 27  # the data after the header of 30 bytes and the name
    archive.write_bytes(damaged)
    with pytest.raises(InputError, match="not a readable archive: Error -3 while decompressing"):
        unpack(archive, tmp_path / "into")


def test_a_member_with_a_password_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", ("x", b"1"))
    damaged = bytearray(archive.read_bytes())
    for flags in (6, damaged.index(b"PK\x01\x02") + 8):  # the encryption flag in both headers
        damaged[flags] |= 1
    archive.write_bytes(damaged)
    with pytest.raises(ConfigError, match="the member 'x' is encrypted"):
        unpack(archive, tmp_path / "into")


@pytest.mark.parametrize("name", ["long" * 100, "file/in/a/file"])
def test_a_member_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    archive = write_tar(tmp_path / "a.tar", ("file", b"1"), (name, b"2"))
    with pytest.raises(InputError, match=f"the member '{name}' cannot be unpacked") as caught:
        unpack(archive, tmp_path / "into")
    assert caught.value.where == str(archive)
    assert str(tmp_path / "into") not in str(caught.value)


def test_the_entry_of_the_packed_folder_itself_is_ignored(tmp_path: Path) -> None:
    """``tar -C data -czf data.tgz .`` creates an archive with the members ./ and ./file."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "x.jsonl").write_text("{}")
    (folder / "sub" / "y.txt").write_text("y")
    subprocess.run(["tar", "-C", folder, "-czf", tmp_path / "data.tgz", "."], check=True)
    into = unpack(tmp_path / "data.tgz", tmp_path / "into")
    assert (into / "x.jsonl").read_text() == "{}"
    assert (into / "sub" / "y.txt").read_text() == "y"


@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_files_that_macos_adds_are_ignored(tmp_path: Path, make) -> None:
    archive = make(
        tmp_path / "a",
        ("._x.jsonl", b"\0"),
        ("__MACOSX/._x.jsonl", b"\0"),
        ("sub/.DS_Store", b"\0"),
        ("x.jsonl", b"{}"),
    )
    into = unpack(archive, tmp_path / "into")
    assert [path.name for path in into.rglob("*")] == ["x.jsonl"]


def tar_header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("packed", [True, False])
def test_a_header_of_gigabytes_is_refused_at_once(
    tmp_path: Path, kind: bytes, packed: bool
) -> None:
    archive = tmp_path / "a.tar"
    start = tar_header("x", kind, 2 << 30)
    if packed:
        archive.write_bytes(gzip.compress(start + bytes(1 << 20)))
    else:
        with archive.open("wb") as file:
            file.write(start)
            file.truncate(2 << 30)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="has a header of 2147483648 bytes; the limit is 1048576"):
        unpack(archive, tmp_path / "into")
    assert time.monotonic() - begin < 5
    assert not (tmp_path / "into").exists()


def test_a_chain_of_headers_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    one = tar_header("x", tarfile.XHDTYPE, 512) + b"11 path=ab\n".ljust(512, b"\0")
    archive.write_bytes(one * 5000)
    with pytest.raises(InputError, match="its headers are nested in a loop"):
        unpack(archive, tmp_path / "into")


@pytest.mark.parametrize("size", [-512, -1024, -1])
def test_a_member_of_negative_size_is_refused(tmp_path: Path, size: int) -> None:
    """tarfile would read the same header again and again without an end."""
    archive = tmp_path / "a.tar"
    first, second = (
        bytearray(tar_header("a", tarfile.REGTYPE, 0)),
        bytearray(tar_header("b", b"0", 0)),
    )
    second[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    second[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(second))[0]
    archive.write_bytes(bytes(first + second) + bytes(1024))
    with pytest.raises(ToolkitError, match=r"leads backwards|unpacks to more|header of -"):
        unpack(archive, tmp_path / "into")


def test_an_archive_above_the_maximum_ratio_is_refused_quickly(tmp_path: Path) -> None:
    """256 MiB of zeros are refused after a part of them is decompressed."""
    archive = tmp_path / "a.tgz"
    block = bytes(1 << 24)
    with gzip.open(archive, "wb", compresslevel=1) as file:
        file.write(tar_header("zeros", b"0", 1 << 28))
        for _ in range(16):
            file.write(block)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"unpacks to more than \d+\.\d MiB"):
        unpack(archive, tmp_path / "into")
    assert time.monotonic() - begin < 5
    assert not (tmp_path / "into").exists()


def test_an_archive_with_too_many_members_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.base.archives.MAX_MEMBERS", 3)
    archive = write_tar(tmp_path / "a.tgz", *[(f"{i}", b"") for i in range(4)])
    with pytest.raises(ConfigError, match="contains more than 3 members"):
        unpack(archive, tmp_path / "into")


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holes").write_bytes(b"")
    os.truncate(tmp_path / "holes", 1 << 20)
    subprocess.run(
        ["tar", "-C", tmp_path, "--sparse", "-cf", tmp_path / "a.tar", "holes"], check=True
    )
    with pytest.raises(ConfigError, match="contains a sparse file: 'holes'"):
        unpack(tmp_path / "a.tar", tmp_path / "into")


def test_control_characters_of_a_member_name_are_escaped(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", ("x\x1b[31m\u202e/../../evil", b"x"))
    with pytest.raises(ConfigError) as caught:
        unpack(archive, tmp_path / "into")
    assert "\\x1b[31m\\u202e" in str(caught.value)
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)
    assert "[U+001B]" in str(ConfigError("x", where="a\x1b[31m"))


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_an_archive_path_that_is_not_a_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tgz"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(InputError, match=r"not a regular file|form a loop"):
        unpack(path, tmp_path / "into")


@pytest.mark.parametrize("kind", ["tar.gz", "of macOS", "zip", "pax"])
def test_many_members_or_headers_are_refused_quickly(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / ("a.zip" if kind == "zip" else "a.tar.gz")
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for number in range(40_000):
                zipped.filelist.append(zipfile.ZipInfo(f"{number:0100}"))
                zipped.filelist[-1].header_offset = zipped.filelist[-1].CRC = 0
            zipped._didModify = True
    elif kind == "pax":
        records = b"6 a=b\n" * 170_000
        header = tar_header("p", tarfile.XHDTYPE, len(records)) + records
        header += bytes(-len(header) % 512)
        members = [header + tar_header(f"x{number}", b"0", 0) for number in range(20)]
        archive.write_bytes(gzip.compress(b"".join(members), 1))
    else:
        folder = "__MACOSX" if kind == "of macOS" else "d"
        headers = b"".join(tar_header(f"{folder}/{number}", b"0", 0) for number in range(10_001))
        archive.write_bytes(gzip.compress(headers, 1))
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"10000 members|headers of more|directory of"):
        unpack(archive, tmp_path / "into")
    assert time.process_time() - begin < 4
    assert not (tmp_path / "into").exists()
