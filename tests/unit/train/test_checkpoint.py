"""A checkpoint is complete or does not exist. A damaged checkpoint is never loaded."""

from __future__ import annotations

import json
import os

import pytest

from toolkit.base.errors import ConfigError, InputError
from toolkit.train.checkpointing import branch, checkpoint

FILES = {"a.json": b'{"x": 1}\n', "t.safetensors": bytes(range(256)) * 3, "empty.json": b""}


def write(run_dir, step):
    partial = checkpoint.begin(run_dir, step)
    for name, content in FILES.items():
        (partial / name).write_bytes(content)
    return checkpoint.commit(partial, step)


def test_a_written_checkpoint_is_intact_and_alone_in_its_folder(tmp_path):
    folder = write(tmp_path, 10)
    assert folder == tmp_path / "checkpoint-10"
    assert checkpoint.find_faults(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert {path.name for path in folder.iterdir()} == {*FILES, checkpoint.CHECKSUMS_FILE}


def damaged_versions(content: bytes):
    yield "truncated", content[:-1]
    yield "zeroed", bytes(len(content))
    middle = len(content) // 2
    yield "flipped", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    yield "longer", content + b" "


def test_a_damaged_file_is_named_and_the_previous_checkpoint_is_used(tmp_path):
    previous = write(tmp_path, 10)
    folder = write(tmp_path, 20)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if not content:
            continue
        for kind, damaged in damaged_versions(content):
            file.write_bytes(damaged)
            assert checkpoint.find_faults(folder), (file.name, kind)
            latest, skipped = branch.latest_checkpoint(tmp_path)
            assert latest == previous, (file.name, kind)
            assert len(skipped) == 1
            # A flipped digit in a checksum is reported as a fault of the file with this checksum.
            is_named = file.name in skipped[0] or file.name == checkpoint.CHECKSUMS_FILE
            assert is_named, (file.name, kind)
        file.unlink()
        assert any(file.name in fault for fault in checkpoint.find_faults(folder)), file.name
        file.write_bytes(content)
    assert checkpoint.find_faults(folder) == []


def test_a_flipped_bit_in_the_checksums_is_detected(tmp_path):
    file = write(tmp_path, 1) / checkpoint.CHECKSUMS_FILE
    content = file.read_bytes()
    for position in range(0, len(content), 7):
        for bit in (0, 5):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(bytes(flipped))
            assert checkpoint.find_faults(file.parent), (position, bit)


def test_a_path_in_the_checksums_outside_the_folder_is_a_fault(tmp_path):
    folder = write(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"x")
    checksums = json.loads((folder / checkpoint.CHECKSUMS_FILE).read_text())
    checksums["files"]["../outside"] = {"bytes": 1, "sha256": "0" * 64}
    text = json.dumps(checksums, indent=1, sort_keys=True) + "\n"
    (folder / checkpoint.CHECKSUMS_FILE).write_text(text)
    assert "points outside" in checkpoint.find_faults(folder)[0]


def test_a_partial_checkpoint_is_ignored_and_later_removed(tmp_path):
    write(tmp_path, 10)
    partial = checkpoint.begin(tmp_path, 20)
    (partial / "half").write_bytes(b"x")
    assert checkpoint.list_steps(tmp_path) == [10]
    checkpoint.begin(tmp_path, 30)
    assert not partial.exists()


def test_writing_a_step_again_moves_the_existing_folder(tmp_path):
    """The existing folder is never removed. It may be damaged or not written by the run."""
    folder = write(tmp_path, 10)
    (folder / "a.json").write_bytes(b"torn")
    write(tmp_path, 10)
    assert checkpoint.find_faults(folder) == []
    assert (tmp_path / "abandoned-1" / "checkpoint-10" / "a.json").read_bytes() == b"torn"
    (tmp_path / "checkpoint-20").symlink_to(folder)
    (tmp_path / "checkpoint-30").write_bytes(b"a file")
    for step in (10, 20, 30):
        write(tmp_path, step)
    assert checkpoint.list_steps(tmp_path) == [30, 20, 10]
    first, second = tmp_path / "abandoned-1", tmp_path / "abandoned-2"
    assert (second / "checkpoint-20").is_symlink()
    assert (second / "checkpoint-30").read_bytes() == b"a file"
    assert checkpoint.find_faults(second / "checkpoint-10") == []
    assert [path.name for path in first.iterdir()] == ["checkpoint-10"]


def test_rotation_keeps_the_latest_and_the_listed_steps(tmp_path):
    for step in (1, 2, 9, 10, 11):
        write(tmp_path, step)
    branch.rotate_checkpoints(tmp_path, [2], keep_last=2)
    assert checkpoint.list_steps(tmp_path) == [11, 10, 2]
    branch.rotate_checkpoints(tmp_path, [], keep_last=0)
    assert checkpoint.list_steps(tmp_path) == [11, 10, 2]


def test_resume_selects_the_checkpoint(tmp_path):
    assert branch.resume_point(tmp_path, "auto") == (None, [])
    assert branch.resume_point(tmp_path, "never") == (None, [])
    with pytest.raises(ConfigError, match="there is no checkpoint to resume from"):
        branch.resume_point(tmp_path, "must")
    folder = write(tmp_path, 3)
    for resume in ("auto", "must", str(folder)):
        assert branch.resume_point(tmp_path, resume) == (folder, [])
    with pytest.raises(ConfigError, match=r"never, but the folder contains a run"):
        branch.resume_point(tmp_path, "never")
    with pytest.raises(InputError, match="the checkpoint does not exist"):
        branch.resume_point(tmp_path, str(tmp_path / "nowhere"))
    (folder / "a.json").unlink()
    with pytest.raises(InputError, match=r"the checkpoint is damaged: a.json is missing"):
        branch.resume_point(tmp_path, str(folder))
    with pytest.raises(ConfigError, match="no checkpoint in this folder is intact") as refused:
        branch.resume_point(tmp_path, "auto")
    assert "a.json is missing" in refused.value.message


def test_links_and_pipes_in_a_checkpoint_are_faults(tmp_path):
    folder = write(tmp_path / "run", 10)
    outside = tmp_path / "outside"
    (folder / "a.json").rename(outside)
    (folder / "a.json").symlink_to(outside)
    assert checkpoint.find_faults(folder) == ["a.json is a link, but was written as a file"]
    (folder / "a.json").unlink()
    os.mkfifo(folder / "a.json")
    assert checkpoint.find_faults(folder) == ["a.json is missing"]
    (folder / checkpoint.CHECKSUMS_FILE).unlink()
    os.mkfifo(folder / checkpoint.CHECKSUMS_FILE)
    assert "is a pipe" in checkpoint.find_faults(folder)[0]
    os.mkfifo(tmp_path / "run" / branch.BRANCH_FILE)
    assert branch.latest_checkpoint(tmp_path / "run")[0] is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"format": 1, "files": {"a.json": 3}}',
        '{"format": 1, "files": {"a\\u0000": {}}}',
    ],
)
def test_checksums_with_invalid_content_are_a_fault(tmp_path, text):
    folder = write(tmp_path, 10)
    if text.startswith("{"):
        text = checkpoint._checksums_text(json.loads(text)["files"])
    (folder / checkpoint.CHECKSUMS_FILE).write_text(text)
    assert checkpoint.find_faults(folder)
