"""Facts about the host and the driver, read from files that the test writes under a root folder."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from toolkit.gpu import driver_files, host, software
from toolkit.gpu.cgroup import read_cgroup

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_limits_of_every_parent_group_apply_in_version_2(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            "sys/fs/cgroup/slurm/memory.max": "max\n",
            "sys/fs/cgroup/slurm/job_7/memory.max": f"{32 * GIB}\n",
            "sys/fs/cgroup/slurm/job_7/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.stat": f"anon {GIB}\n"
            f"active_file {GIB}\ninactive_file {GIB // 2}\nshmem 77\n",
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000\n",
        },
    )
    assert read_cgroup(tmp_path) == {
        "version": 2,
        "memory_limit": 32 * GIB,
        "memory_used": 3 * GIB - 3 * GIB // 2,  # without the page cache, which can be freed
        "cpu_limit": 4.0,
    }


def test_the_largest_number_means_no_limit_in_version_1(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{16 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    # Inside a container the path of its group is not visible. The root folder is the group.
    found = read_cgroup(tmp_path)
    assert found == {
        "version": 1,
        "memory_limit": 16 * GIB,
        "memory_used": 4096,
        "cpu_limit": None,
    }
    write_files(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert read_cgroup(tmp_path)["memory_limit"] is None


def test_a_group_path_cannot_leave_the_cgroup_folder(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"proc/self/cgroup": "0::/../../etc\n", "sys/fs/cgroup/cgroup.controllers": ""}
    )
    assert read_cgroup(tmp_path)["memory_limit"] is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42",
            "550.90.07",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build",
            "580.159.04",
        ),
    ],
)
def test_the_kernel_modules_version(text: str, version: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"proc/driver/nvidia/version": text})
    assert driver_files.kernel_module(tmp_path) == version


def test_the_first_libcuda_on_the_path_of_the_loader_is_used(tmp_path: Path) -> None:
    real, image = "usr/lib/x86_64-linux-gnu", "usr/local/cuda/compat"
    write_files(
        tmp_path,
        {f"{real}/libcuda.so.580.159.04": "", f"{image}/libcuda.so.590.44.01": ""},
    )
    (tmp_path / real / "libcuda.so.1").symlink_to("libcuda.so.580.159.04")
    (tmp_path / image / "libcuda.so.1").symlink_to("libcuda.so.590.44.01")
    cache = b"glibc-ld.so.cache1.1\0libcuda.so.1\0/" + real.encode() + b"/libcuda.so.1\0"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_bytes(cache)
    found = driver_files.libcuda({"LD_LIBRARY_PATH": f"/nowhere:/{image}"}, tmp_path)
    assert [(entry["version"], entry["source"]) for entry in found] == [
        ("590.44.01", "LD_LIBRARY_PATH"),
        ("580.159.04", "ld.so.cache"),
    ]
    assert driver_files.libcuda({}, tmp_path)[0]["version"] == "580.159.04"


def test_libnuma_is_found_where_the_loader_looks(tmp_path: Path) -> None:
    assert software.find_libnuma({}, tmp_path) is None
    write_files(
        tmp_path, {"opt/lib/libnuma.so.1": "", "etc/ld.so.cache": "/opt/lib/libnuma.so.1\0"}
    )
    assert software.find_libnuma({}, tmp_path) == "/opt/lib/libnuma.so.1"
    write_files(tmp_path, {"usr/mine/libnuma.so.1": ""})
    found = software.find_libnuma({"LD_LIBRARY_PATH": "/usr/mine"}, tmp_path)
    assert found == "/usr/mine/libnuma.so.1"


def test_a_loop_of_links_is_not_a_libcuda(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib64"
    folder.mkdir(parents=True)
    (folder / "libcuda.so.1").symlink_to("libcuda.so.1")
    assert driver_files.libcuda({}, tmp_path) == []


def test_cards_on_the_pci_bus(tmp_path: Path) -> None:
    for number, (vendor, kind) in enumerate(
        [("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]
    ):
        folder = f"sys/bus/pci/devices/0000:0{number}:00.0"
        write_files(tmp_path, {f"{folder}/vendor": vendor, f"{folder}/class": kind})
    assert driver_files.pci_gpus(tmp_path) == 1


def test_xids_are_read_from_a_log_file_if_the_ring_buffer_is_not_readable(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "var/log/kern.log": "boot\n"
            "kernel: NVRM: Xid (PCI:0000:18:00): 79, pid='<unknown>', GPU has fallen off the bus\n"
            "kernel: nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 20034, Fatal, Link 30\n"
            "kernel: nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 11004, Non-fatal, Link 2\n"
            "kernel: NVRM: loading\n"
        },
    )
    found = driver_files.kernel_log(tmp_path).value
    assert found == [
        {"kind": "xid", "number": 79, "bus": "0000:18:00", "age_s": None},
        {"kind": "sxid", "number": 20034, "bus": "0000:c3:00.0", "age_s": None},
    ]
    assert driver_files.kernel_log(tmp_path / "empty").failed


def test_only_variables_that_checks_read_are_kept() -> None:
    kept = host.recorded_variables(
        {"HF_TOKEN": "hf_secret", "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin"}
    )
    assert kept == {"CUDA_VISIBLE_DEVICES": "0"}
    assert not [name for name in host.RECORDED_VARIABLES if "TOKEN" in name or "KEY" in name]


def test_a_missing_folder_is_replaced_by_its_nearest_parent(tmp_path: Path) -> None:
    found = host.disk_facts("output_dir", tmp_path / "runs" / "deep" / "run")
    assert found["writable"]
    assert found["free"] > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("environ", "files", "container"),
    [
        ({}, {}, None),
        ({}, {".dockerenv": ""}, "docker"),
        ({}, {"run/.containerenv": "", ".dockerenv": ""}, "podman"),
        ({"APPTAINER_CONTAINER": "/x.sif"}, {".dockerenv": ""}, "apptainer"),
        ({"container": "systemd-nspawn"}, {}, "systemd-nspawn"),
    ],
)
def test_the_container_engine_is_detected(
    environ: dict[str, str], files: dict[str, str], container: str | None, tmp_path: Path
) -> None:
    write_files(
        tmp_path, {**files, "proc/sys/kernel/osrelease": "6.6.87.2-microsoft-standard-WSL2"}
    )
    found = host.detect_environment({**environ, "SLURM_JOB_ID": "7"}, tmp_path)
    assert found == {"container": container, "kubernetes": False, "slurm": True, "wsl": True}


def test_reading_this_host_fills_every_field_and_writes_nothing(tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    found = host.read(dict(os.environ), {"output_dir": tmp_path})
    assert found.memory.has_value
    assert found.cpus.value == len(os.sched_getaffinity(0))
    assert found.clock.has_value or found.clock.failed
    assert sorted(os.listdir(tmp_path)) == before
    assert socket.gethostname() not in str(found.place)
