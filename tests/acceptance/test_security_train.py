"""The promises of SECURITY.md, tested on real runs of ``toolkit train``."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
from spoiled_world import RUN, FinishedCommand, make_model, make_world, run_commands

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit" / "train"))
from test_report_page import Page

pytestmark = pytest.mark.thorough

CANARY = "a canary that sings"
TOKEN = "hf_" + "aB3dE6gH9jKl" * 3
LEAKS = f"""\
import atexit, logging, os, sys, warnings

atexit.register(lambda: print("at the end", os.environ["MY_SERVICE_TOKEN"]))

def score(completions, log_extra, log_metric, **kwargs):
    os.umask(0)
    os.chdir("/")
    secret = os.environ["MY_SERVICE_TOKEN"] + " and {TOKEN}"
    print("printed", secret)
    print("to stderr", secret, file=sys.stderr)
    logging.getLogger("mine").error("logged %s", secret)
    try:
        raise ValueError(secret)
    except ValueError:
        logging.getLogger("mine").exception("caught")
    warnings.warn(secret)
    log_metric("metric of " + secret, 1.0)
    log_extra("column of " + secret, [repr({{"it's": secret}})] * len(completions))
    return [float(len(set(text))) for text in completions]
"""
EVIL = "import pathlib; pathlib.Path(__file__).with_suffix('.was-run').write_text('x')\n"
IMPOSTORS = ("json", "torch", "trl", "numpy", "yaml", "sitecustomize", "helper")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedCommand]:
    root = tmp_path_factory.mktemp("security")
    model = make_model(root)
    from tiny_llama import make_tiny

    leaks = make_world(root / "leaks", model)
    (leaks / "mine.py").write_text(LEAKS)
    for name in IMPOSTORS:
        (leaks / f"{name}.py").write_text(EVIL)
    make_world(root / "written", model, grpo={"hub_token": TOKEN})
    make_world(root / "by-form", model, dataset={"system": f"say {TOKEN}"})
    climbs = make_world(root / "climbs", model)
    (climbs / "model").unlink()
    (climbs / "model").mkdir()
    for file in model.iterdir():
        (climbs / "model" / file.name).write_bytes(file.read_bytes())
    index = {"weight_map": {"model.embed_tokens.weight": "../../leaks/model/model.safetensors"}}
    (climbs / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    pickled = make_world(root / "pickled", model)
    (pickled / "model").unlink()
    (pickled / "model").mkdir()
    (pickled / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    (pickled / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch was-run'\ntR.")
    explodes = make_world(root / "explodes", model, dataset={"prompt": "messages"})
    (explodes / "model").unlink()
    make_tiny(explodes / "model", chat=True)
    (explodes / "model" / "chat_template.jinja").write_text("{{ messages[0].role * 10**12 }}")
    row = {"messages": [{"role": "user", "content": "1+2="}], "answer": "3"}
    (explodes / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    names = ("leaks", "written", "by-form", "climbs", "pickled", "explodes")
    env = {"MY_SERVICE_TOKEN": CANARY}
    cases = [
        {"folder": root / name, "arguments": ["train", "run.yaml"], "env": env, "umask": 0}
        for name in names
    ]
    return dict(zip(names, run_commands(cases), strict=True))


def test_no_secret_is_printed_or_written(results: dict[str, FinishedCommand]) -> None:
    run = results["leaks"]
    assert run.returncode == 0, run.stderr
    assert "printed [redacted: MY_SERVICE_TOKEN] and [redacted: Hugging Face token]" in run.stdout
    assert "to stderr [redacted" in run.stderr
    assert "logged [redacted" in run.stderr
    assert "ValueError: [redacted" in run.stderr
    assert "Traceback" in run.stderr  # the reward itself logs its exception
    files = [path for path in (run.folder / "out").rglob("*") if path.is_file()]
    assert {"manifest.json", "metrics.jsonl", "report.html"} <= {path.name for path in files}
    for text in (run.stdout, run.stderr, *(path.read_text(errors="replace") for path in files)):
        assert CANARY not in text
        assert TOKEN not in text


def test_no_file_is_readable_by_others_even_without_a_umask(
    results: dict[str, FinishedCommand],
) -> None:
    out = results["leaks"].folder / "out"
    for path in (out, *out.rglob("*")):
        allowed = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) & ~allowed == 0, path


def test_nothing_is_pickled(results: dict[str, FinishedCommand]) -> None:
    suffixes = {
        path.suffix for path in (results["leaks"].folder / "out").rglob("*") if path.is_file()
    }
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".html", ".md", ""}


def test_a_file_beside_the_run_file_is_not_run_under_another_name(
    results: dict[str, FinishedCommand],
) -> None:
    assert sorted(path.name for path in results["leaks"].folder.glob("*.was-run")) == []


@pytest.mark.parametrize(("name", "key"), [("written", "hub_token"), ("by-form", "dataset.system")])
def test_a_secret_in_the_run_file_is_an_error_that_does_not_show_it(
    results, name: str, key: str
) -> None:
    run = results[name]
    assert run.returncode == 1, run.stderr
    assert key in run.stderr
    assert TOKEN not in run.stdout + run.stderr
    assert not (run.folder / "out").exists()


def test_weights_linked_to_outside_are_refused(results: dict[str, FinishedCommand]) -> None:
    run = results["climbs"]
    assert run.returncode in (1, 2), run.stdout
    assert "../../leaks/model/model.safetensors" in run.stderr
    assert "Traceback" not in run.stderr


def test_pickled_weights_are_refused(results: dict[str, FinishedCommand]) -> None:
    run = results["pickled"]
    assert run.returncode in (1, 2), run.stdout
    assert "Traceback" not in run.stderr
    assert not (run.folder / "was-run").exists()


def test_an_endless_chat_template_is_an_error_with_its_name(
    results: dict[str, FinishedCommand],
) -> None:
    run = results["explodes"]
    assert run.returncode == 1, run.stdout
    assert "the chat template of this tokenizer needs too much" in run.stderr
    assert str(run.folder / "model") in run.stderr
    assert "Traceback" not in run.stderr


def test_the_name_of_a_metric_is_shown_without_its_secret(
    results: dict[str, FinishedCommand],
) -> None:
    row = results["leaks"].rows()[0]
    assert [name for name in row if name.startswith("metric of [redacted: MY_SERVICE_TOKEN]")]


def test_remote_code_is_off_and_shown(results: dict[str, FinishedCommand]) -> None:
    config = json.loads((results["leaks"].folder / "out" / "config.json").read_text())
    assert config["model"]["trust_remote_code"] is False
    assert "trust_remote_code" not in RUN["model"]
    report = (results["leaks"].folder / "out" / "report.html").read_text()
    assert "trust_remote_code" in report


def test_the_report_of_a_real_run_requests_nothing(results: dict[str, FinishedCommand]) -> None:
    report = (results["leaks"].folder / "out" / "report.html").read_text()
    page = Page(report)
    assert page.tags.count("script") == 1
    assert not {"src", "href", "style"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
