"""A small HTTP server that stands in for the Hugging Face Hub: who am I, create, preupload, LFS,
commit, download.

It keeps what it was sent (`requests`, `files` by repository and path) and fails as it is told, by a
part of the path: `refuse["/commit/"] = (500,)` always, with the error code that the Hub would send
as a second item; `[(500,), (429,)]` one after the other and then no more. Instead of a status,
`"hang"` never answers and `"reset"` cuts the connection in the middle of the body.
"""

import base64
import hashlib
import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.file_download

LFS = (".safetensors", ".pt", ".pth", ".zip")
SHA = "1" * 40


def take_for_the_hub(server, monkeypatch):
    """Let huggingface_hub, in this process, talk to a stand-in."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for room in (huggingface_hub.constants, huggingface_hub.file_download):  # in it before 1.0
        monkeypatch.setattr(room, "HUGGINGFACE_CO_URL_TEMPLATE", address, raising=False)


class Handler(BaseHTTPRequestHandler):
    """One connection; what is answered is the `Hub`'s affair."""

    protocol_version = "HTTP/1.1"

    def send(self, data=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle_one(self):
        size, path = int(self.headers.get("Content-Length") or 0), unquote(urlsplit(self.path).path)
        fault = self.server.hub.fault(path)
        body = self.rfile.read(size // 2 if fault == "reset" else size)
        self.server.hub.requests.append((self.command, path, dict(self.headers), body))
        if fault == "hang":
            self.server.hub.closing.wait()
        if fault in ("hang", "reset"):
            return self.reset()
        if fault:
            return self.send(self.server.hub.refusal, fault[0], **self.server.hub.code(*fault[1:]))
        answer = self.server.hub.reply(self.command, path, body)
        if isinstance(answer, bytes):
            return self.send(
                answer, ETag=f'"{hashlib.sha1(answer).hexdigest()}"', X_Repo_Commit=SHA
            )
        body = json.dumps(answer[0]).encode()
        return self.send(body, *answer[1:2], Content_Type="application/json",
                         **self.server.hub.code(*answer[2:]))  # fmt: skip

    do_GET = do_POST = do_HEAD = do_PUT = handle_one

    def log_message(self, *_):
        pass


class Hub:
    """One stand-in Hub on a free port of this machine; use it as a context manager."""

    def __init__(self, role: str = "write", user: dict | None = None):
        self.user = {
            "name": "ada",
            "type": "user",
            "orgs": [],
            "auth": {"accessToken": {"role": role}},
        } | (user or {})
        self.requests, self.files, self.repos, self.refuse, self.objects = [], {}, {}, {}, {}
        self.branches = {}
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.refusal = json.dumps(
            {"error": "refused by the test", "url": f"{self.url}/ada/some"}
        ).encode()

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @staticmethod
    def code(code=None):
        """The header in which the Hub says what kind of error it is."""
        return {"X_Error_Code": code} if code else {}

    def fault(self, path):
        """What to do wrong with this request, if anything."""
        for part, told in self.refuse.items():
            if part in path:
                if isinstance(told, list):
                    return told.pop(0) if told else None
                return told
        return None

    def asked(self, part):
        """How many requests had `part` in their path."""
        return sum(part in path for _, path, *_ in self.requests)

    def sent(self):
        """Every byte of every body that was sent here."""
        return b"".join(body for *_, body in self.requests)

    def private(self, repo):
        """Whether a repository was made private; huggingface_hub 2 says it in other words."""
        wanted = self.repos[repo]
        return wanted.get("private") is True or wanted.get("visibility") == "private"

    def reply(self, method, path, body):
        """A file's bytes, or body, status and error code of an answer."""
        if path.startswith("/api/whoami"):
            return (self.user,)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return ({"errors": [], "warnings": []},)
        if path.endswith("/auth-check"):
            return ({},)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs(json.loads(body)["objects"])
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return ({},)
        if path.startswith("/api/models/"):
            return self.model(path.removeprefix("/api/models/"), body)
        if path.startswith("/api/datasets/"):  # kept under another name
            return self.model(path.removeprefix("/api/"), body, 3)
        if "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            return self.files.get(repo, {}).get(rest.partition("/")[2]) or (
                {},
                404,
                "EntryNotFound",
            )
        return {"error": f"the stand-in does not know {method} {path}"}, 404

    def create(self, wanted):
        repo = f"{wanted.get('organization') or self.user['name']}/{wanted['name']}"
        known = repo in self.repos
        self.repos.setdefault(repo, wanted)
        return {"url": f"{self.url}/{repo}"}, 409 if known else 200

    def lfs(self, wanted):
        """As the Hub's LFS server: only what it does not have is to be put."""
        objects = []
        for item in wanted:
            put = {"upload": {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}}
            objects.append({**item, **({} if item["oid"] in self.objects else {"actions": put})})
        return ({"transfer": "basic", "objects": objects},)

    def model(self, path, body, parts=2):
        """`/api/models/owner/name…`: what is there, what to upload how, and the commit."""
        repo, rest = "/".join(path.split("/")[:parts]), "/".join(path.split("/")[parts:])
        if repo not in self.repos:
            return {"error": "Repository not found"}, 404, "RepoNotFound"
        files = self.files.setdefault(repo, {})
        if rest.startswith("preupload/"):
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = [
                {
                    "path": n,
                    "uploadMode": "lfs" if n.endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for n in names
            ]
            return ({"files": modes},)
        if rest.startswith("commit/"):
            for line in map(json.loads, body.splitlines()):
                self.apply(files, line["key"], line["value"])
            return (
                {"commitUrl": f"{self.url}/{repo}/commit/{SHA}", "commitOid": SHA, "success": True},
            )
        if rest.startswith("branch/"):
            self.branches[repo, rest.removeprefix("branch/")] = dict(files)
            return ({},)
        if rest.startswith("tree/"):
            return (
                [{"type": "file", "path": n, "size": len(d), "oid": SHA} for n, d in files.items()],
            )
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return ({"id": repo, "sha": SHA, "private": self.private(repo), "siblings": siblings},)

    def apply(self, files, key, value):
        """One line of a commit."""
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.objects[value["oid"]]
        elif key == "deletedFolder":
            for name in [
                name for name in files if name.startswith(value["path"].rstrip("/") + "/")
            ]:
                del files[name]
        elif key == "deletedFile":
            del files[value["path"]]
