"""The real yaml-language-server completes, explains and checks the keys of a run file.

The test installs the server once from the npm registry into .setup/ (30 MB). It talks to the server
as an editor does: over the language server protocol on standard input and output.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.config.schemas import schema_path

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "2.0.0"
HOME = Path(__file__).parents[2] / ".setup" / f"yaml-language-server-{VERSION}"
WAIT_S = 60.0

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None or shutil.which("node") is None,
    reason="npm or node is not installed; yaml-language-server needs both",
)

TEXT = f"""\
# yaml-language-server: $schema={schema_path("run")}
model:
  model_name: a/b
grpo:
  num_generations: 8
  loss_tpye: dapo
  beta: high
  loss_type:\u0020
"""
# The positions (line and character, both from 0) of the requests.
ON_KEY, AT_VALUE, NEW_KEY = (4, 5), (7, 13), (7, 2)


@pytest.fixture(scope="session")
def server_folder() -> Path:
    """The folder of the installed server."""
    program = HOME / "node_modules" / ".bin" / "yaml-language-server"
    if not program.exists():
        fresh = HOME.with_name(f"{HOME.name}.{os.getpid()}")
        fresh.mkdir(parents=True)
        subprocess.run(
            ["npm", "install", "--prefix", fresh, "--no-audit", "--no-fund", "--ignore-scripts",
             "--silent", f"yaml-language-server@{VERSION}"],
            check=True, timeout=300,
        )  # fmt: skip
        if program.exists():
            shutil.rmtree(fresh)  # another test run has installed the server in the meantime
        else:
            fresh.rename(HOME)
    return HOME


class Client:
    """A minimal editor: it sends requests and notifications, and answers the server's requests."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [folder / "node_modules" / ".bin" / "yaml-language-server", "--stdio"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.answers: dict[int, dict[str, Any]] = {}
        self.diagnostics: queue.Queue[list[dict[str, Any]]] = queue.Queue()
        self.answered = threading.Condition()
        self.count = 0
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        while header := stream.readline():
            if not header.lower().startswith(b"content-length:"):
                continue
            length = int(header.split(b":")[1])
            while stream.readline().strip():
                pass
            self._take(json.loads(stream.read(length)))

    def _take(self, message: dict[str, Any]) -> None:
        if "method" in message and "id" in message:
            items = message.get("params", {}).get("items", [])
            wanted = message["method"] == "workspace/configuration"
            result = [SETTINGS.get(item.get("section"), {}) for item in items] if wanted else None
            self._send({"id": message["id"], "result": result})
        elif message.get("method") == "textDocument/publishDiagnostics":
            self.diagnostics.put(message["params"]["diagnostics"])
        elif "id" in message:
            with self.answered:
                self.answers[message["id"]] = message
                self.answered.notify_all()

    def notify(self, method: str, params: dict[str, Any]) -> None:
        """Send a notification."""
        self._send({"method": method, "params": params})

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        """Send a request and return the result."""
        self.count += 1
        request_id = self.count
        self._send({"id": request_id, "method": method, "params": params})
        with self.answered:
            assert self.answered.wait_for(lambda: request_id in self.answers, WAIT_S), (
                f"the server did not answer {method}"
            )
        answer = self.answers.pop(request_id)
        assert "error" not in answer, answer
        return answer["result"]

    def close(self) -> None:
        """End the server, then the thread that reads from it."""
        self.process.kill()
        self.process.wait(WAIT_S)
        self.reader.join(WAIT_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


SETTINGS: dict[str, Any] = {
    "yaml": {"validate": True, "hover": True, "completion": True, "schemaStore": {"enable": False}}
}


@pytest.fixture
def editor(server_folder: Path, tmp_path: Path) -> Iterator[tuple[Client, dict[str, str]]]:
    """A client of a server that has opened the run file, and the document."""
    client = Client(server_folder)
    document = {"uri": (tmp_path / "run.yaml").as_uri()}
    try:
        support: dict[str, Any] = {
            "textDocument": {"completion": {}, "hover": {}},
            "workspace": {"configuration": True},
        }
        client.ask(
            "initialize",
            {"processId": os.getpid(), "rootUri": tmp_path.as_uri(), "capabilities": support},
        )
        client.notify("initialized", {})
        client.notify("workspace/didChangeConfiguration", {"settings": SETTINGS})
        opened = {**document, "languageId": "yaml", "version": 1, "text": TEXT}
        client.notify("textDocument/didOpen", {"textDocument": opened})
        yield client, document
    finally:
        client.close()


def position_params(document: dict[str, str], at: tuple[int, int]) -> dict[str, Any]:
    """The parameters of a request about a position."""
    return {"textDocument": document, "position": {"line": at[0], "character": at[1]}}


def labels(answer: Any) -> list[str]:
    """The labels in the answer to a completion request."""
    items = answer["items"] if isinstance(answer, dict) else answer
    return [str(item["label"]) for item in items]


def test_an_editor_completes_explains_and_marks_errors(
    editor: tuple[Client, dict[str, str]],
) -> None:
    client, document = editor
    diagnostics: list[dict[str, Any]] = []
    while not diagnostics:
        diagnostics = client.diagnostics.get(timeout=WAIT_S)
    by_line = {one["range"]["start"]["line"]: one["message"] for one in diagnostics}
    assert "loss_tpye is not allowed" in by_line[5]
    assert "number" in by_line[6]
    hover = client.ask("textDocument/hover", position_params(document, ON_KEY))
    assert "Number of generations per prompt to sample" in json.dumps(hover["contents"])
    values = labels(client.ask("textDocument/completion", position_params(document, AT_VALUE)))
    assert {"dapo", "grpo", "vespo"} <= set(values)
    keys = labels(client.ask("textDocument/completion", position_params(document, NEW_KEY)))
    assert {"max_completion_length", "vllm_importance_sampling_mode", "max_prompt_length"} <= set(
        keys
    )
    assert not {"use_vllm", "hub_token"} & set(keys)  # a run file may not set these
