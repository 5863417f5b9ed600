"""A local server that answers the requests with which huggingface_hub creates a repository and
commits files to it.
"""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubHub:
    """The state of the server.

    ``repos`` says for each created repository whether it is private. ``files`` has the content of
    each committed file. ``tokens`` has the Authorization header of each request that the server
    knows.
    """

    def __init__(self, status: int = 200) -> None:
        self.status, self.repos, self.files = status, {}, {}
        self.tokens, self.messages, self.requests = {}, [], []

    def handle_request(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(size)
        path = handler.path.partition("?")[0]
        request = f"{handler.command} {path}"
        self.requests.append(request)
        status, found = self.status, {"error": "no"}
        if status == 200:
            found = self._response(path, body)
            status = 404 if found is None else 200
        # Only requests of an upload are recorded, because they need a token. Libraries may look
        # up names without a token.
        if found is not None:
            self.tokens[request] = handler.headers.get("Authorization")
        data = json.dumps(found or {}).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _response(self, path: str, body: bytes):
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.repos[name] = asked.get("visibility") == "private"
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                row = json.loads(line)
                value = row["value"]
                if row["key"] == "header":
                    self.messages.append(value["summary"])
                elif row["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
            return {
                "commitUrl": f"{self.url}/me/sums/commit/1", "commitOid": "1" * 40, "success": True,
                "pullRequestUrl": None,
            }  # fmt: skip
        return None


@contextmanager
def serving(hub: StubHub):
    """Serve ``hub`` at ``hub.url`` within the ``with`` block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hub.handle_request(self)

        do_GET = do_HEAD = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
