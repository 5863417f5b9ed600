"""``toolkit export --push`` uploads the adapter and its model card to a local stub of the hub. The
command that serves the adapter is also tested.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner
from stub_hub import StubHub, serving

sys.path.append(str(Path(__file__).resolve().parents[2] / "acceptance"))

import train_world

from toolkit.base.errors import ConfigError, RetryError
from toolkit.cli.export import export
from toolkit.config import load_run
from toolkit.policy.hub_upload import push_folder
from toolkit.train.checkpointing.trained_run import open_run
from toolkit.train.model_card import model_card, serve_arguments, serve_line
from toolkit.train.run import run
from toolkit.train.run_context import Options


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    world = train_world.make_run_files(folder, steps=2)
    config = load_run(str(world), ["reward.isolate=false", f"runtime.output_dir={folder / 'run'}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(config, Options(out=io.StringIO(), evaluate=True))
    return folder / "run"


@pytest.fixture
def hub(monkeypatch):
    with serving(StubHub()) as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
        yield found


def test_export_with_push_uploads_the_adapter_and_a_card(finished, hub, tmp_path):
    to = tmp_path / "sums"
    done = CliRunner().invoke(
        export, [str(finished), "--to", str(to), "--push", "me/sums", "--private"]
    )
    assert done.exit_code == 0, done.output
    assert hub.repos == {"me/sums": True}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files)
    for name, content in hub.files.items():
        assert content == (to / name).read_bytes(), name
    assert {"POST /api/repos/create", "POST /api/models/me/sums/commit/main"} <= set(hub.tokens)
    assert set(hub.tokens.values()) == {"Bearer hf_" + "a" * 34}, hub.tokens
    assert f"to {hub.url}/me/sums" in done.output
    assert done.output.splitlines()[-1].startswith("serve it: vllm serve")


def test_without_push_nothing_is_sent(finished, hub, tmp_path):
    done = CliRunner().invoke(export, [str(finished), "--to", str(tmp_path / "here")])
    assert done.exit_code == 0, done.output
    assert hub.requests == []


def test_the_card_describes_the_training_and_has_no_local_path(finished):
    card = model_card(open_run(finished), "me/sums")
    head = card.split("---")[1]
    assert "library_name: peft" in head
    assert "base_model" not in head  # the base model is a local folder
    assert "| rank, alpha | 4, 8 |" in card
    assert "my_rewards:ones (weight 1), exact_match (weight 0.5)" in card
    assert "| learning_rate | 0.01 |" in card
    assert "| seeds | grpo.seed 3, lora.random_state 5 |" in card
    assert "| held out, ones (6 prompts) |" in card
    assert "| sha256 of the train data |" in card
    assert str(finished.parent) not in card


def test_errors_of_the_hub_are_explained(tmp_path, hub, monkeypatch):
    (tmp_path / "file").write_text("x")
    hub.status = 403
    with pytest.raises(ConfigError, match=r"rejects me/sums \(403\)") as caught:
        push_folder(tmp_path, "me/sums")
    assert "HF_TOKEN" in str(caught.value.fix)
    with pytest.raises(ConfigError, match="not a valid name of a repository"):
        push_folder(tmp_path, "me/../x y")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RetryError, match="upload to me/sums failed") as away:
        push_folder(tmp_path, "me/sums")
    assert f"hf upload me/sums {tmp_path}" in str(away.value.fix)


def test_the_serve_command_of_an_adapter(finished):
    config = open_run(finished).config
    words = serve_arguments(config, Path("out/sums"))
    assert words[:3] == ["vllm", "serve", config.model.model_name]
    assert words[-5:] == ["--enable-lora", "--max-lora-rank", "8", "--lora-modules",
                          "sums=out/sums"]  # fmt: skip
    assert serve_line(config, Path("a b"), merged=True).startswith("vllm serve 'a b'")
