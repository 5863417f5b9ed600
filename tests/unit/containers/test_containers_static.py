"""Checks of the container files that need no build. A linter or validator checks each kind of
file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from toolkit.cli import envcheck, train

REPO = Path(__file__).resolve().parents[3]
CONTAINERS = REPO / "containers"
SCRIPTS = sorted([*CONTAINERS.glob("*.sh"), *CONTAINERS.glob("slurm/*")])
MANIFESTS = sorted(CONTAINERS.glob("kubernetes/*.yaml"))


def tool(name: str) -> str:
    """The path of a tool of the dev extra, which is in the folder of this Python or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: run `just setup`")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=REPO, timeout=120
    )


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    result = run(tool("hadolint"), CONTAINERS / "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) > 8
    result = run(tool("shellcheck"), "-x", *SCRIPTS)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_parses_in_the_shell_that_it_names(script: Path) -> None:
    first = script.read_text().splitlines()[0]
    shell = "bash" if "bash" in first else "sh"
    result = run(shell, "-n", script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("section", ["%post", "%test", "%runscript", "%environment"])
def test_each_shell_section_of_the_definition_parses(section: str, tmp_path: Path) -> None:
    body = sections((CONTAINERS / "toolkit.def").read_text())[section]
    path = tmp_path / "section.sh"
    path.write_text(re.sub(r"\{\{ \w+ \}\}", "VALUE", body))
    result = run("sh", "-n", path)
    assert result.returncode == 0, result.stderr


def sections(text: str) -> dict[str, str]:
    """The sections of a definition file, as a dict from name to body."""
    parts = re.split(r"^(%\w+)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_definition_uses_every_argument_that_it_names_and_no_other() -> None:
    text = (CONTAINERS / "toolkit.def").read_text()
    defined = set(re.findall(r"^    (\w+)=", sections(text)["%arguments"], re.MULTILINE))
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == defined


def test_the_environment_of_the_definition_never_overrides_the_host() -> None:
    body = sections((CONTAINERS / "toolkit.def").read_text())["%environment"]
    exports = re.findall(r"^\s*export (\w+)=(.*)$", body, re.MULTILINE)
    assert exports
    for name, value in exports:
        assert f"${{{name}:-" in value, f"{name} would replace the value of the host"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_each_manifest_is_valid_kubernetes(manifest: Path) -> None:
    result = run(tool("kubernetes-validate"), "--strict", manifest)
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_file_is_valid() -> None:
    result = run(
        tool("check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        CONTAINERS / "compose.yaml",
    )
    assert result.returncode == 0, result.stdout


def pods() -> list[tuple[str, dict[str, object]]]:
    """(name, pod spec) of each object in kubernetes/ that creates pods."""
    found = []
    for manifest in MANIFESTS:
        for document in yaml.safe_load_all(manifest.read_text()):
            spec = document.get("spec", {})
            spec = spec.get("jobTemplate", {}).get("spec", spec)
            if "template" in spec:
                found.append((document["metadata"]["name"], spec["template"]["spec"]))
    return found


def test_every_container_has_a_restricted_security_context() -> None:
    containers = [
        (name, container)
        for name, pod in pods()
        for container in [*pod.get("initContainers", []), *pod["containers"]]
    ]
    assert len(containers) == 5
    for name, container in containers:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"]["drop"] == ["ALL"], name
        assert "limits" in container["resources"], name


def job_of(manifest: str) -> dict[str, Any]:
    text = (CONTAINERS / "kubernetes" / manifest).read_text()
    return next(one for one in yaml.safe_load_all(text) if one["kind"] == "Job")


def test_every_container_runs_a_command_that_exists() -> None:
    programs = {"toolkit": train.cli, "envcheck": envcheck.cli}
    for name, pod in pods():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            program, command, *arguments = container["args"]
            found = programs[program].get_command(click.Context(programs[program]), command)
            assert found is not None, name
            paths = ["run.yaml" if one == "/config/run.yaml" else one for one in arguments]
            found.make_parser(click.Context(found)).parse_args(paths)  # refuses unknown options


def test_the_numbers_of_a_job_of_groups_agree() -> None:
    job = job_of("train-groups.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (check,), (train,) = pod["initContainers"], pod["containers"]
    cards = train["resources"]["limits"]["nvidia.com/gpu"]
    nodes = spec["completions"]
    train_variables = {one["name"]: one.get("value") for one in train["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == nodes == int(train_variables["PET_NNODES"])
    assert train["args"][-2:] == ["--nproc-per-node", cards]
    check_variables = {one["name"]: one["value"] for one in check["env"]}
    assert check_variables["WORLD_SIZE"] == str(nodes * int(cards))
    assert check_variables["LOCAL_WORLD_SIZE"] == cards
    assert train_variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(train_variables["MASTER_PORT"]) == train["ports"][0]["containerPort"]
    text = (CONTAINERS / "kubernetes/train-groups.yaml").read_text()
    service = next(one for one in yaml.safe_load_all(text) if one["kind"] == "Service")
    assert service["metadata"]["name"] == pod["subdomain"]
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    index = next(one for one in train["env"] if one["name"] == "PET_NODE_RANK")
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("manifest", ["train-job.yaml", "train-groups.yaml"])
def test_the_job_acts_on_the_exit_codes(manifest: str) -> None:
    job = job_of(manifest)
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {
        (rule["onExitCodes"]["containerName"], code): rule["action"]
        for rule in rules
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert actions[("train", 75)] == "Ignore"
    assert actions[("preflight", 1)] == actions[("train", 1)] == "FailJob"
    # After exit code 3 (bad node) or 4 (busy node) another pod can help, so no rule ends the job.
    assert not {code for _, code in actions} & {3, 4}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_every_base_is_pinned_by_digest() -> None:
    text = (CONTAINERS / "Dockerfile").read_text()
    bases = dict(re.findall(r"^ARG (\w*BASE_IMAGE)=(\S+)$", text, re.MULTILINE))
    assert set(bases) == {"BASE_IMAGE", "CPU_BASE_IMAGE"}
    for base in bases.values():
        assert re.search(r"@sha256:[0-9a-f]{64}$", base), base
    stages = set(re.findall(r" AS (\S+)$", text, re.MULTILINE))
    for source in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert source in stages | {"scratch"} or source.strip("${}") in bases, source
    definition = (CONTAINERS / "toolkit.def").read_text()
    assert bases["BASE_IMAGE"].split("@")[1] in definition, "definition and Dockerfile differ"


def test_the_build_context_has_only_the_files_of_the_product() -> None:
    lines = (CONTAINERS / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {
        *("LICENSE", "README.md", "pyproject.toml", "toolkit", "schemas", "locks", "containers")
    }


def test_every_image_has_a_health_check_an_init_and_a_user() -> None:
    text = (CONTAINERS / "Dockerfile").read_text()
    for target in ("envcheck", "train", "train-cpu"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert 'CMD ["toolkit-health"]' in stage, target
        assert 'ENTRYPOINT ["tini", "-s", "--", "toolkit-entrypoint"]' in stage, target
        assert "\nUSER 1000:1000\n" in stage, target
