"""Checks of a model's files: complete, incomplete and hostile ones. Each check ends in bounded time
with a short text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.base.files import MAX_JSON_BYTES
from toolkit.gpu.checks import CheckContext, CheckResult, run_checks
from toolkit.gpu.model_folder import locate, read
from toolkit.gpu.snapshot import NodeSnapshot

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def write_model(folder: Path, *, shards: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text("{}")
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    for name in names:
        (folder / name).write_bytes(b"x" * 1000)
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def check_model(folder: Path, **context: Any) -> dict[str, CheckResult]:
    snapshot = NodeSnapshot(model=read(str(folder), environ={}))
    asked = CheckContext(configured=True, model=str(folder), **context)
    return {result.id: result for result in run_checks(snapshot, asked, only=["model"])}


def test_a_complete_model_passes(tmp_path: Path) -> None:
    found = check_model(write_model(tmp_path), sizer_model_types=("llama",))
    assert {name: result.verdict for name, result in found.items()} == {
        "model.location": "ok",
        "model.weights": "ok",
        "model.config": "ok",
        "model.tokenizer": "ok",
        "model.architecture": "ok",
    }
    assert found["model.weights"].evidence == "2 files, 2.0 KiB"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    result = check_model(tmp_path)["model.weights"]
    assert (result.verdict, result.blame) == ("fail", "user")
    assert "model-00002-of-00002.safetensors" in result.evidence


def test_broken_links_and_loops_of_links_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").symlink_to("../blobs/none")
    (folder / "loop").symlink_to("loop")
    result = check_model(folder)["model.weights"]
    assert result.verdict == "fail"
    assert "loop, model-00001-of-00002.safetensors: broken links" in result.evidence


@pytest.mark.parametrize(
    ("damage", "check", "text"),
    [
        (lambda f: (f / "config.json").unlink(), "model.config", "config.json does not exist"),
        (lambda f: (f / "config.json").write_text('{"a'), "model.config", "read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "model.config", "not an object"),
        (lambda f: (f / "config.json").write_text("{}"), "model.config", "no architecture"),
        (lambda f: (f / "config.json").write_text("[" * 90_000), "model.config", "nested too"),
        (lambda f: (f / "tokenizer.json").unlink(), "model.tokenizer", "no tokenizer"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
            "model.weights",
            "no weight_map",
        ),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b""),
            "model.weights",
            "empty",
        ),
    ],
)
def test_each_fault_fails_its_check(damage: Any, check: str, text: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    damage(folder)
    result = check_model(folder)[check]
    assert result.verdict == "fail"
    assert text in result.evidence
    assert len(result.evidence) < 400


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with (folder / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert "the limit is" in check_model(folder)["model.config"].evidence


def test_a_folder_without_weights_fails(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shards=0)
    (folder / "model.safetensors.index.json").unlink()
    assert "contains no weights" in check_model(folder)["model.weights"].evidence


def test_an_unknown_architecture_fails(tmp_path: Path) -> None:
    folder = write_model(tmp_path, architectures=["NobodyForCausalLM"], model_type="nobody")
    assert check_model(folder)["model.architecture"].verdict == "warn"
    strict = check_model(folder, engine="vllm")["model.architecture"]
    assert (strict.verdict, strict.blame) == ("fail", "user")
    assert "NobodyForCausalLM" in strict.evidence


def test_a_model_type_that_the_sizer_does_not_know_warns(tmp_path: Path) -> None:
    result = check_model(write_model(tmp_path), sizer_model_types=("qwen3",))["model.architecture"]
    assert result.verdict == "warn"
    assert "the sizer supports llama only approximately" in result.evidence


def test_a_model_is_found_in_the_hub_cache(tmp_path: Path) -> None:
    base = tmp_path / "hub/models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_model(base / "snapshots" / commit)
    environ = {"HF_HOME": str(tmp_path)}
    expected = {"kind": "cache", "path": str(base / "snapshots" / commit)}
    assert locate("org/name", commit, environ) == expected
    assert locate("org/name", "v2", environ)["kind"] == "hub"


def test_offline_and_not_in_the_cache_fails(tmp_path: Path) -> None:
    for variable, expected in (("1", "fail"), ("0", "warn")):
        environ = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": variable}
        snapshot = NodeSnapshot(model=read("org/name", environ=environ), environment=environ)
        (result,) = run_checks(snapshot, CheckContext(model="org/name"), only=["model"])
        assert result.verdict == expected


def test_a_path_that_does_not_exist_fails(tmp_path: Path) -> None:
    (result,) = check_model(tmp_path / "none" / "deep" / "er").values()
    assert (result.id, result.verdict) == ("model.location", "fail")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["architectures", "weight_map", "auto_map", "quantization_config", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(config=_JSON | st.binary(max_size=60), index=_JSON | st.binary(max_size=60))
def test_any_content_gives_results_and_no_exception(
    config: Any, index: Any, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    for name, content in (("config.json", config), ("model.safetensors.index.json", index)):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    found = check_model(folder)
    assert all(len(result.evidence) < 2000 for result in found.values())
    assert found["model.location"].verdict == "ok"
