"""Unpack archives with arbitrary content: the result must be files inside the folder or a
ToolkitError, in time.

python tests/fuzz/fuzz_archives.py [20000] [--seconds 3600] [--seed 0] [--workers 2]
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

from fuzz_loop import Change, Round, change, main, measure_seconds, mutate, run_inputs
from hypothesis import strategies as st

from toolkit.base.archives import unpack
from toolkit.base.errors import ToolkitError

# Some archives deliberately contain a name twice.
warnings.filterwarnings("ignore", message="Duplicate name")

MEGABYTES = 400.0
LIMIT_BYTES = 1 << 22
NAMES = st.sampled_from(
    [".", "./", "./a", "a", "a/b", "a/../b", "..", "../x", "/x", "C:\\x", "a\\b", "._a",
     "sub/.DS_Store", "__MACOSX/a", " ", "a\n",
     "\x1b[31m", "\u202e", "long" * 80, "a/b/c/d", "\udcff"]
) | st.text(min_size=1, max_size=8).filter(lambda text: "\0" not in text)  # fmt: skip
KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 6
    + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    + [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, b"?"]
)
SIZES = st.sampled_from([None] * 6 + [0, 1, 511, 512, -1, -512, 1 << 20, 1 << 31, 1 << 62])
MEMBER = st.tuples(NAMES, KINDS, st.binary(max_size=600), SIZES)
FORMS = st.sampled_from(["tar", "tgz", "tbz", "txz", "zip"])
PACK = {"tar": bytes, "tgz": gzip.compress, "tbz": bz2.compress, "txz": lzma.compress}


def build_archive(
    members: list[tuple[str, bytes, bytes, int | None]], form: str, pax: bool
) -> bytes:
    """An archive of the members. In a tar file, the header has the given size, even a wrong one."""
    if form == "zip":
        return _zip(members)
    sink = io.BytesIO()
    for name, kind, content, size in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "../../x"
        info.size = len(content) if size is None else size
        if pax:
            info.pax_headers = {"comment": "x" * 100}
        try:
            header = info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)
        except (ValueError, UnicodeError, OverflowError):
            continue
        sink.write(header + content + bytes(-len(content) % 512))
    return bytes(PACK[form](sink.getvalue() + bytes(1024)))


def _zip(members: list[tuple[str, bytes, bytes, int | None]]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, kind, content, size in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = {tarfile.SYMTYPE: 0o120777, tarfile.DIRTYPE: 0o040755}.get(
                kind, 0
            ) << 16
            info.compress_type = zipfile.ZIP_DEFLATED if size else zipfile.ZIP_STORED
            try:
                zipped.writestr(info, content)
            except (ValueError, UnicodeError):
                continue
    return sink.getvalue()


INPUT = (st.lists(MEMBER, max_size=4), FORMS, st.booleans(), st.lists(change, max_size=3))


def check_input(folder: Path, members: Any, form: str, pax: bool, changes: list[Change]) -> float:
    """Write and unpack one archive, and return the processor time in seconds."""
    path, into = folder / "packed" / f"a.{form}", folder / "into"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(mutate(build_archive(members, form, pax), changes))
    shutil.rmtree(into, ignore_errors=True)
    took = measure_seconds(lambda: _unpack_and_check(path, into))
    assert sorted(one.name for one in folder.iterdir() if one != into) == ["packed"]
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    path.unlink()
    return took


def _unpack_and_check(path: Path, into: Path) -> None:
    refused = ""
    try:
        unpack(path, into, limit_bytes=LIMIT_BYTES)
    except ToolkitError as error:
        refused = str(error)
    assert "\x1b" not in refused, refused
    size = 0
    for one in into.rglob("*"):
        assert not one.is_symlink()
        assert one.is_file() or one.is_dir()
        size += one.stat().st_size if one.is_file() else 0
    assert size <= LIMIT_BYTES


def run_round(one: tuple[int, int]) -> Round:
    """Check one round of inputs: ``one`` is (number of inputs, seed)."""
    with tempfile.TemporaryDirectory() as folder:
        return run_inputs(lambda *drawn: check_input(Path(folder), *drawn), *one, *INPUT)


if __name__ == "__main__":
    sys.exit(main(run_round, "Archives:", count=20_000, megabytes=MEGABYTES))
