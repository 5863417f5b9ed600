"""The envcheck image is small, runs as any user on a read-only root and contains no build files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time

import pytest
from image_store import REPO, USERS, Store, assert_no_build_traces, build_layers

pytestmark = pytest.mark.image
MIB = 1 << 20


@pytest.mark.parametrize("user", USERS)
def test_the_image_runs_as_any_user_on_a_read_only_root(
    store: Store, envcheck_image: str, user: str
) -> None:
    result = store.run(envcheck_image, user, "envcheck", "check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks:" in result.stdout


@pytest.mark.parametrize("user", USERS)
def test_any_user_has_a_name_a_home_and_a_working_folder(
    store: Store, envcheck_image: str, user: str
) -> None:
    program = (
        "import getpass, os, pathlib; home = pathlib.Path.home(); (home / 'x').touch();"
        "print(getpass.getuser(), home, os.getcwd())"
    )
    result = store.run(envcheck_image, user, "python3", "-c", program)
    assert result.returncode == 0, result.stderr
    name, home, folder = result.stdout.split()
    assert name
    assert (home, folder) == ("/cache", "/work")


def test_the_default_user_is_not_root(store: Store, envcheck_image: str) -> None:
    config = store.inspect(envcheck_image)["OCIv1"]["config"]
    assert config["User"] == "1000:1000"
    assert config["WorkingDir"] == "/work"


def test_the_image_adds_less_than_200_mb_to_its_base(store: Store, envcheck_image: str) -> None:
    layers = store.inspect(envcheck_image)["OCIv1"]["rootfs"]["diff_ids"]
    added = 0
    for archive in build_layers(store, envcheck_image):
        added += sum(member.size for member in archive)
    assert len(layers) > 1
    assert added < 200 * MIB, f"{added / MIB:.0f} MiB"
    print(f"envcheck adds {added / MIB:.1f} MiB to its base")


def test_no_layer_contains_build_files(store: Store, envcheck_image: str) -> None:
    assert_no_build_traces(store, envcheck_image)


def test_the_image_has_no_pip(store: Store, envcheck_image: str) -> None:
    result = store.run(envcheck_image, "1000:1000", "/opt/toolkit/bin/python", "-m", "pip", "-V")
    assert "No module named pip" in result.stderr


def test_manifest_and_labels_name_the_lock(store: Store, envcheck_image: str) -> None:
    digest = hashlib.sha256((REPO / "locks/light.txt").read_bytes()).hexdigest()
    result = store.run(envcheck_image, "1000:1000", "cat", "/usr/share/toolkit/image.json")
    manifest = json.loads(result.stdout)
    assert manifest["lock"]["digest"] == f"sha256:{digest}"
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (REPO / "locks/light.txt").read_text(), re.M))
    assert manifest["packages"] == {name.lower(): version for name, version in pins.items()}
    labels = store.inspect(envcheck_image)["OCIv1"]["config"]["Labels"]
    assert labels["toolkit.lock.digest"] == manifest["lock"]["digest"]
    assert labels["org.opencontainers.image.version"] == manifest["version"]
    assert labels["org.opencontainers.image.revision"] == manifest["revision"]
    assert re.match(r"[0-9a-f]{40}", manifest["revision"])


def test_the_image_has_a_health_check(store: Store, envcheck_image: str) -> None:
    """The OCI image format has no health check, so the build uses the Docker format and removes
    the random names that this format contains.
    """
    found = store.inspect(envcheck_image)
    config = json.loads(str(found["Config"]))
    assert config["config"]["Healthcheck"]["Test"] == ["CMD", "toolkit-health"]
    assert config["config"]["Healthcheck"]["Interval"] == 60 * 10**9
    assert config["config"]["Hostname"] == ""
    assert not {"container", "container_config", "parent"} & config.keys()
    shown = store.podman("image", "inspect", "--format", "{{.HealthCheck.Test}}", envcheck_image)
    answer = subprocess.run(shown, capture_output=True, text=True, check=True)
    assert answer.stdout == "[CMD toolkit-health]\n"


def test_the_health_check_detects_a_stalled_run(store: Store, envcheck_image: str) -> None:
    script = (
        "toolkit-health && mkdir /cache/run && touch /cache/run/timings.jsonl && toolkit-health"
        " && touch -d '1 hour ago' /cache/run/timings.jsonl && toolkit-health"
    )
    options = ("--tmpfs", "/cache:rw,mode=1777", "--env", "TOOLKIT_RUN_DIR=/cache/run")
    result = store.run(envcheck_image, "1000:1000", "sh", "-c", script, options=options)
    assert result.returncode == 1
    assert re.fullmatch(
        r"the run has written no step for 36\d\d s \(/cache/run/timings.jsonl\)\n", result.stdout
    )


def test_a_container_without_a_writable_folder_gets_a_message(
    store: Store, envcheck_image: str
) -> None:
    # The last folder that the entrypoint tries is /dev/shm. Here it is read-only too.
    options = ("--shm-size", "0", "--mount", "type=tmpfs,destination=/dev/shm,ro=true")
    result = store.run(envcheck_image, "4242:0", "envcheck", "check", options=options)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no writable place for caches" in result.stderr
    assert "uid 4242, gid 0" in result.stderr
    assert "--tmpfs /cache" in result.stderr


def test_compiled_kernels_are_written_to_an_executable_folder(
    store: Store, envcheck_image: str
) -> None:
    """A tmpfs is mounted noexec by default, so a compiled kernel in it cannot be loaded."""
    closed = ("--tmpfs", "/cache:rw,noexec,mode=1777")
    show = ("4242:0", "sh", "-c", "echo $HF_HOME $TRITON_CACHE_DIR")
    other = (*closed, "--tmpfs", "/tmp:rw,exec,mode=1777")
    found = store.run(envcheck_image, *show, options=other)
    assert found.stdout.split() == ["/cache/huggingface", "/tmp/toolkit-4242/triton"]
    opened = ("--tmpfs", "/cache:rw,exec,mode=1777")
    found = store.run(envcheck_image, *show, options=opened)
    assert found.stdout.split() == ["/cache/huggingface", "/cache/toolkit-4242/triton"]
    told = store.run(envcheck_image, "4242:0", "toolkit", "--version", options=closed)
    assert told.returncode == 0, told.stderr
    assert "warning: /cache is mounted noexec" in told.stderr
    assert "--tmpfs /cache:rw,exec,mode=1777" in told.stderr


def test_a_signal_reaches_the_command_through_init(store: Store, envcheck_image: str) -> None:
    name = f"toolkit-signal-{os.getpid()}"
    script = 'trap "exit 75" TERM; echo ready; while :; do sleep 0.1; done'
    options = ("--tmpfs", "/cache:rw,mode=1777", "--name", name)
    command = [*store.command(envcheck_image, "4242:0", *options), "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        asked = time.monotonic()
        kill = store.podman("kill", "--signal", "TERM", name)
        subprocess.run(kill, check=True, capture_output=True)
        assert process.wait(timeout=20) == 75
        assert time.monotonic() - asked < 10
