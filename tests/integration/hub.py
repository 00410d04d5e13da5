"""A stand-in for the Hugging Face hub, on a port of this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


class Hub:
    """
    Answers what `upload` and `SAE.from_pretrained` ask of the hub.

    Its files lie in `files`, by repository and path; a test may add to them. `gets` has the paths
    that were fetched. An upload needs `TOKEN`.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gets: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.resolve(has_body=False)

            def do_GET(self) -> None:
                hub.gets.append(self.path)
                path = self.path.partition("?")[0]
                if not path.startswith("/api/models/"):
                    self.resolve(has_body=True)
                    return
                repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
                if repo not in hub.files:
                    self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
                    return
                siblings = [{"rfilename": name} for name in hub.files[repo]]
                self.answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.partition("?")[0]
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.answer(401, {"error": "Invalid username or password."})
                elif path == "/api/repos/create":
                    request = json.loads(body)
                    repo = "/".join(filter(None, (request.get("organization"), request["name"])))
                    hub.files[repo] = {}
                    self.answer(200, {"url": f"{hub.url}/{repo}"})
                elif path == "/api/validate-yaml":
                    self.answer(200, {"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    modes = [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                    self.answer(200, {"files": modes})
                elif "/commit/" in path:
                    repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                    for line in map(json.loads, body.splitlines()):
                        value = line["value"]
                        if line["key"] != "header":
                            hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                    commit = {"commitOid": COMMIT, "commitUrl": f"{hub.url}/{repo}/commit/0"}
                    self.answer(200, {"success": True, **commit})
                else:
                    self.answer(404, {"error": path})

            def resolve(self, has_body: bool) -> None:
                repo, _, name = self.path.removeprefix("/").partition("/resolve/main/")
                content = hub.files.get(repo, {}).get(name)
                headers = {"X-Repo-Commit": COMMIT}
                if content is None:
                    self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
                    return
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, content, headers, has_body)

            def answer(
                self,
                status: int,
                body: Any,
                headers: dict[str, str] | None = None,
                has_body: bool = True,
            ) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if has_body:
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub within the `with` block."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.stop()
