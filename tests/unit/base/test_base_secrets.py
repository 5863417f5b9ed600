"""Secrets are found by their pattern, by the name of their key, and by the environment variable
that has their value.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.base.formatting import escape_unprintable
from toolkit.base.secrets import (
    PATTERNS,
    find_secret,
    is_secret_key,
    protect_output,
    redact,
    redact_tree,
)

# Invented secrets. Each is joined from parts, so that no secret scanner reports this file.
EXAMPLES = {
    "Hugging Face token": "hf_" + "aB3dE6gH9jKl" * 3,
    "API key": "sk-" + "proj-" + "x1Y2z3" * 8,
    "GitHub token": "ghp_" + "a1B2c3" * 6,
    "GitLab token": "glpat-" + "a1B2c3" * 4,
    "AWS key": "AKIA" + "ABCD" * 4,
    "Google key": "AIza" + "a1B2c" * 7,
    "NVIDIA key": "nvapi-" + "a1B2c3" * 8,
    "Weights & Biases key": "wandb_v1_" + "a1B2c3" * 6,
    "Slack token": "xoxb-" + "1234567890-abc",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVm",
    "password in a URL": "https://user:hunter2hunter2@host/x",
    "bearer token": "Bearer " + "abcdef0123456789",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
}


def test_every_pattern_has_an_example() -> None:
    assert set(EXAMPLES) == set(PATTERNS)


def test_a_token_after_an_underscore_is_found() -> None:
    token = "hf_" + "aB3dE6gH9jKl" * 2
    assert redact(f"my_key_{token}: 1") == "my_key_[redacted: Hugging Face token]: 1"


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_secret_is_found_and_redacted_by_its_pattern(kind: str) -> None:
    secret = EXAMPLES[kind]
    text = f"before {secret} after"
    shown = redact(text, {})
    assert find_secret(text) == kind
    assert f"[redacted: {kind}]" in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert secret not in shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_transfer",
        "pad_token",
        "task-based skis",
        "a:b@c",
        "https://host:80/x",
        "The bearer came",
    ],
)
def test_ordinary_text_is_not_changed(text: str) -> None:
    assert find_secret(text) is None
    assert redact(text, {"HOME": "/root"}) == text


@pytest.mark.parametrize(
    "name",
    ["hub_token", "token", "api_key", "apikey", "OPENAI_API_KEY", "password", "HF_TOKEN",
     "push_to_hub_token_api_key", "aws_secret_access_key", "client_secret"],
)  # fmt: skip
def test_a_name_that_suggests_a_secret_is_recognised(name: str) -> None:
    assert is_secret_key(name)


@pytest.mark.parametrize(
    "name",
    ["pad_token", "eos_token", "max_tokens", "tokens_per_s", "tokenizer", "keep_last", "key",
     "max_num_batched_tokens", "token_type_ids", "secretary", "model_name"],
)  # fmt: skip
def test_a_name_that_only_resembles_a_secret_is_not_recognised(name: str) -> None:
    assert not is_secret_key(name)


def test_values_of_secret_variables_are_redacted() -> None:
    environ = {
        "MY_SERVICE_TOKEN": "correct horse battery",
        "SHORT_TOKEN": "none",
        "USER": "abcdefgh",
    }
    shown = redact("x correct horse battery abcdefgh none", environ)
    assert shown == "x [redacted: MY_SERVICE_TOKEN] abcdefgh none"


def test_a_path_to_a_secret_is_not_redacted() -> None:
    assert redact("/run/token", {"HF_TOKEN": "/run/token"}) == "/run/token"


def test_a_secret_that_begins_with_a_slash_is_redacted() -> None:
    secret = "/kZx8+3jd/ksl=="
    shown = redact(f"key {secret}", {"AWS_SECRET_ACCESS_KEY": secret})
    assert shown == "key [redacted: AWS_SECRET_ACCESS_KEY]"


@pytest.mark.parametrize(
    "secret",
    ["it's a canary", 'say "canary" now', "back\\slash\\canary", "tab\tcanary\nsecond line here",
     "both ' and \" canary", "schön & canary/é", "canary\x1b[0m bell"],
)  # fmt: skip
@pytest.mark.parametrize(
    "show",
    [str, ascii, repr, json.dumps, lambda s: repr({"h": s}), lambda s: repr([s, "'", '"']),
     lambda s: repr(ValueError({"a": s})), lambda s: repr(s.encode()), lambda s: repr(repr(s)),
     lambda s: json.dumps(repr(s)), lambda s: json.dumps({"a": s}, ensure_ascii=False),
     lambda s: repr("it's " + s), lambda s: repr("it's a \"" + s), urllib.parse.quote,
     lambda s: urllib.parse.quote(s, safe=""), lambda s: urllib.parse.urlencode({"a": s}),
     lambda s: "\n".join(f"  {line}" for line in s.splitlines())],
)  # fmt: skip
def test_a_secret_is_redacted_in_every_encoding(secret: str, show) -> None:
    shown = redact(f"before {show(secret)} after", {"MY_PASSWORD": secret})
    assert "canary" not in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")


@pytest.mark.parametrize("control", ["\x1b", "\u202e", "\0", "\u200b", "\udcff", "\r"])
def test_a_secret_is_redacted_after_its_control_characters_are_escaped(control: str) -> None:
    secret = f"a canary{control}that\nsings"
    for shown in (escape_unprintable(secret), escape_unprintable(secret).replace("\n", "\\n")):
        assert redact(f"<{shown}>", {"MY_PASSWORD": secret}) == "<[redacted: MY_PASSWORD]>"


@pytest.mark.parametrize(
    "name",
    ["PGPASSWORD", "MYSQL_PWD", "SENTRY_DSN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
     "AWS_ACCESS_KEY_ID", "X_PASSWORD", "DB_PASS", "N_SECRET", "GOOGLE_CREDENTIALS", "GITHUB_PAT",
     "ENCRYPTION_KEY", "NPM_AUTH", "AZURE_STORAGE_CONNECTION_STRING", "wandb_api_key", "GH_JWT",
     "REDISCLI_AUTH", "SLACK_WEBHOOK_URL", "PASSWORD", "TOKEN"],
)  # fmt: skip
def test_the_value_of_a_secret_variable_is_redacted(name: str) -> None:
    assert redact("a canary that sings", {name: "a canary that sings"}) == f"[redacted: {name}]"


@pytest.mark.parametrize(
    "name", ["PWD", "OLDPWD", "HOME", "PATH", "MY_KEYS", "TOKENIZERS_PARALLELISM", "TASK_URL"]
)
def test_the_value_of_another_variable_is_not_redacted(name: str) -> None:
    assert redact("a canary that sings", {name: "a canary that sings"}) == "a canary that sings"


@pytest.mark.parametrize(
    ("name", "url"),
    [("DATABASE_URL", "postgres://me:s3cr3t-canary@db/x"), ("http_proxy", "http://u:s3cr3t-canary@p"),
     ("BROKER_URI", "amqp://:s3cr3t-canary@h"), ("X", "see redis://me:s3cr3t-canary@h/0 there"),
     ("A_URL", "https://me:s3cr3t%2Dcanary@h")],
)  # fmt: skip
def test_a_password_in_the_url_of_any_variable_is_redacted(name: str, url: str) -> None:
    assert redact("s3cr3t-canary", {name: url}) == f"[redacted: {name}]"
    assert "canary" not in redact(f"at {url} now", {name: url})


def test_a_secret_removed_from_the_environment_is_still_redacted(monkeypatch) -> None:
    monkeypatch.setenv("ONCE_TOKEN", "a canary that sings")
    redact("")
    monkeypatch.delenv("ONCE_TOKEN")
    assert redact("a canary that sings") == "[redacted: ONCE_TOKEN]"


def test_secrets_in_a_tree_are_redacted() -> None:
    tree = {
        "token": "short",
        "pad_token": "<pad>",
        "hub_token": None,
        "list": [EXAMPLES["AWS key"], 1, 2.5, True, None],
        EXAMPLES["GitHub token"]: {"api_key": "x"},
    }
    assert redact_tree(tree, {}) == {
        "token": "[redacted]",
        "pad_token": "<pad>",
        "hub_token": None,
        "list": ["[redacted: AWS key]", 1, 2.5, True, None],
        "[redacted: GitHub token]": {"api_key": "[redacted]"},
    }
    assert tree["token"] == "short"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_redacting_twice_equals_redacting_once(tree: object) -> None:
    once = redact_tree(tree, {})
    assert redact_tree(once, {}) == once
    json.dumps(once)


@pytest.mark.parametrize(
    "hostile",
    ["a." * 50_000, "eyJ" + "a" * 100_000, "sk-" * 50_000, "x://" * 30_000, "Bearer " * 20_000,
     "-----BEGIN PRIVATE KEY-----" * 5_000, "eyJaaaaaaaa-" * 10_000, "hf_" + "a" * 100_000],
)  # fmt: skip
def test_hostile_text_is_redacted_quickly(hostile: str) -> None:
    started = time.perf_counter()
    redact(hostile, {})
    assert time.perf_counter() - started < 10


def test_streams_and_log_records_are_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    factory = logging.getLogRecordFactory()
    secret = EXAMPLES["Hugging Face token"]
    log = logging.getLogger("elsewhere.deep")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    undo = protect_output()
    try:
        handler.setStream(sys.stderr)
        print(f"out {secret}")
        print(f"err {secret}", file=sys.stderr)
        log.warning("log %s", secret)
        try:
            raise ValueError(secret)
        except ValueError:
            log.exception("failed")
        log.warning("wrong %d", secret)
    finally:
        undo()
        log.removeHandler(handler)
    shown = capsys.readouterr()
    assert secret not in shown.out + shown.err
    assert "out [redacted: Hugging Face token]" in shown.out
    assert "log [redacted: Hugging Face token]" in shown.err
    assert "ValueError: [redacted: Hugging Face token]" in shown.err
    assert "wrong" in shown.err
    assert logging.getLogRecordFactory() is factory


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_process_with_protected_output_works_in_every_encoding(encoding: str) -> None:
    code = (
        "import sys, os\n"
        "from toolkit.base.secrets import protect_output\n"
        "protect_output()\n"
        "if True:\n"
        "    print(sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.fileno())\n"
        "    print(os.environ['HF_TOKEN'], file=sys.stderr, flush=True)\n"
        "    sys.stdout.writelines(['a\\n', 'b\\n'])\n"
        "    sys.stdout.buffer.write(b'c ' + os.environ['HF_TOKEN'].encode() + b' \\xff')\n"
        "    import click\n"
        "    click.echo('echoed ' + os.environ['HF_TOKEN'])\n"
        "    click.echo(b'bytes ' + os.environ['HF_TOKEN'].encode())\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"HF_TOKEN": "a canary that sings", "PYTHONIOENCODING": encoding},
    )
    assert f"False {encoding} 1".encode() in shown.stdout
    assert b"a\nb\n" in shown.stdout
    for line in (b"c [redacted: HF_TOKEN] \xff", b"echoed [redacted", b"bytes [redacted"):
        assert line in shown.stdout
    assert shown.stderr == b"[redacted: HF_TOKEN]\n"
    assert b"canary" not in shown.stdout


def test_output_of_exit_handlers_is_redacted() -> None:
    code = """
import atexit, logging, os, sys, threading, time
from toolkit.base.secrets import protect_output
secret = os.environ["HF_TOKEN"]
class Last:
    def __del__(self): print("deleted", secret)
last = Last()
atexit.register(lambda: print("at exit", secret, file=sys.stderr))
atexit.register(lambda: print("original", secret, file=sys.__stderr__))
protect_output()
logging.basicConfig(); logging.warning("logged %s", secret)
def late(): time.sleep(0.1); print("thread", secret); raise ValueError(secret)
threading.Thread(target=late).start()
raise RuntimeError({"it's": secret})
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"HF_TOKEN": "it's a canary"},
    )
    printed = shown.stdout + shown.stderr
    assert "canary" not in printed
    for what in (
        "thread ",
        "logged ",
        "at exit ",
        "original ",
        "ValueError: ",
        'RuntimeError: {"it\'s": "',
    ):
        assert f"{what}[redacted: HF_TOKEN]" in printed
