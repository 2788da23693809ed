"""A small HTTP server that stands in for the Hugging Face Hub: who am I, create, preupload, commit.

It keeps what it was sent (`requests`, `files`), and can be told to refuse paths with a status and, where the Hub sends
one, an error code: `refuse["create"] = (500,)`.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """One stand-in Hub on a free port of this machine; use it as a context manager."""

    def __init__(self, role: str = "write"):
        self.role, self.requests, self.files, self.repos, self.refuse = role, [], {}, {}, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body, status=200, code=None):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def handle_one(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, self.path, dict(self.headers), body))
                for part, refusal in hub.refuse.items():
                    if part in self.path:
                        return self.answer({"error": "refused by the test"}, *refusal)
                return self.answer(*hub.reply(self.command, self.path, body))

            do_GET = do_POST = do_HEAD = handle_one

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, method, path, body):
        """Body and status for one request."""
        if path.startswith("/api/whoami"):
            return ({"name": "ada", "type": "user", "auth": {"accessToken": {"role": self.role}}},)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            owner = wanted.get("organization") or "ada"
            self.repos[f"{owner}/{wanted['name']}"] = wanted
            return ({"url": f"{self.url}/{owner}/{wanted['name']}"},)
        if path == "/api/validate-yaml":
            return ({"errors": [], "warnings": []},)
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return ({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]},)
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            return ({"commitUrl": f"{self.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True},)
        if path.endswith("/revision/main") or path.startswith("/api/models/"):
            return ({"id": path.split("/api/models/")[1].split("/revision")[0], "sha": "1" * 40, "siblings": []},)
        return {"error": f"the stand-in does not know {method} {path}"}, 404
