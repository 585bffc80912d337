"""A Hub of one machine: so much of the Hugging Face Hub's HTTP interface as an upload and a download take.

The client is the real ``huggingface_hub``. Files are kept by commit; safetensors travel as large files (LFS),
the rest inside the commit, as on the Hub.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class SmallHub:
    """Repositories by name: ``{"commits": {sha: {path: bytes}}, "main": sha, "private": bool}``."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuses = 0  # HTTP status that commits get, to see what a user is told
        self.address = ""

    def create(self, name: str, private: bool) -> bool:
        if name in self.repos:
            return False
        empty = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = {"commits": {empty: {}}, "main": empty, "private": private}
        return True

    def files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        repo = self.repos[name]
        return repo["commits"].get(repo["main"] if revision == "main" else revision)

    def commit(self, name: str, lines: list[dict]) -> str:
        files = dict(self.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        sha = hashlib.sha1(json.dumps([name, lines, self.repos[name]["main"]]).encode()).hexdigest()
        self.repos[name]["commits"][sha], self.repos[name]["main"] = files, sha
        return sha


def entry(path: str, content: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(".safetensors"):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


class Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Be quiet."""

    def answer(self, content=b"", status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        if self.command != "PUT" and self.headers.get("Authorization") != "Bearer hf_small":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            created = hub.create(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
            return self.answer({"url": f"{hub.address}/{name}", "id": name}, 200 if created else 409)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/large/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                return self.answer(b"", 422)
            hub.large[found[1]] = body
            return self.answer()
        found = re.fullmatch(r"/(?:api/models/)?([\w-]+/[\w-]+)(?:\.git)?/(.*)", path)
        if not found or found[1] not in hub.repos:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        name, rest = found.groups()
        return self.in_repo(name, rest, body)

    def in_repo(self, name: str, rest: str, body: bytes) -> None:
        hub, (what, _, more) = self.hub, rest.partition("/")
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return self.answer({"files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in files
            ]})  # fmt: skip
        if rest == "info/lfs/objects/batch":
            return self.answer({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]})  # fmt: skip
        if what == "commit":
            if hub.refuses:
                why = "You do not have the rights"
                return self.answer({"error": why}, hub.refuses, {"X-Error-Message": why})
            sha = hub.commit(name, [json.loads(line) for line in body.splitlines() if line.strip()])
            url = f"{hub.address}/{name}/commit/{sha}"
            return self.answer({"success": True, "commitUrl": url, "commitOid": sha})
        revision, _, file = (more or "main").partition("/")
        files = hub.files(name, revision)
        if files is None:
            return self.answer({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        sha = hub.repos[name]["main"] if revision == "main" else revision
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "sha": sha, "private": False, "siblings": siblings, "tags": []})
        if what == "tree":
            return self.answer([entry(*item) for item in files.items()])
        if what == "resolve" and file in files:
            etag = hashlib.sha256(files[file]).hexdigest()
            return self.answer(files[file], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        return self.answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one


@contextmanager
def small_hub(monkeypatch, cache):
    """Serve an empty Hub, and point the client in this process at it."""
    from huggingface_hub import constants

    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by plain HTTP
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_small")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
