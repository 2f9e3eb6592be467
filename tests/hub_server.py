"""A small local server that speaks the hub's API to the real huggingface_hub client.

    repos = {"datasets/me/books": {"data/0.parquet": b"..."}, "me/model": {"config.json": b"{}"}}
    with serve(repos, faults={"GET 0.parquet": [503, "drop"]}) as hub:
        ...  # HF_ENDPOINT=hub.url in a subprocess, or point_client_at(hub.url, monkeypatch)
        hub.requests["GET /datasets/me/books/resolve/main/data/0.parquet"]

A key of `repos` is OWNER/NAME or NAME for a model, with "datasets/" before it for a dataset.
`faults` maps "METHOD path-ending" to what its next requests meet, one entry each:
    429, 500, 404, ...   that status (429 and 503 with Retry-After: 0)
    "drop"               half of the body, then the connection closes
    "truncate"           half of the body as if it were all of it
    "damage"             the right length, but zeros
    b"..."               these bytes instead
    None                 served well

Uploads work as well, by the older way of Git LFS (HF_HUB_DISABLE_XET=1): they end in `repos`. With
`token` set, every POST must bear it. hub.private holds the repos that are not public.
"""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.hub.connections.append(self.connection)

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def upload(self, path, body):
        """The requests of an upload, in the order in which they come."""
        hub = self.server.hub
        if path.startswith("/lfs/"):  # the storage takes no token: the address is secret enough
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return self.reply(400, b'{"error": "not the bytes that were promised"}')
            hub.stored[oid] = body
            return self.reply(200, b"")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply(401, b'{"error": "Invalid credentials in Authorization header"}')
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in hub.repos:
                return self.reply(409, json.dumps({"url": f"{hub.url}/{name}"}).encode())
            hub.repos[name] = {".gitattributes": b""}
            closed = wanted.get("visibility") == "private" or wanted.get("private")
            hub.private |= {name} if closed else set()
            return self.reply(200, json.dumps({"url": f"{hub.url}/{name}"}).encode())
        if path == "/api/validate-yaml":
            return self.reply(200, b"{}")
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            for file in files:
                large = file["path"].endswith(".safetensors")
                file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            return self.reply(200, json.dumps({"files": files}).encode())
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
            answer = {"transfer": "basic", "objects": objects}
            return self.reply(200, json.dumps(answer).encode())
        repo, found, _ = path.removeprefix("/api/models/").partition("/commit/main")
        if not found or repo not in hub.repos:
            return self.missing("RepoNotFound")
        files = dict(hub.repos[repo])
        for change in map(json.loads, body.splitlines()):
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        hub.repos[repo] = files
        hub.commit = f"{int(hub.commit, 16) + 1:040x}"
        about = {"commitUrl": f"{hub.url}/{repo}/commit/{hub.commit}", "commitOid": hub.commit}
        self.reply(200, json.dumps(about).encode())

    def answer(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        line, body = f"{self.command} {path}", self.body()
        with hub.lock:
            hub.requests[line] += 1
            ends = (
                e
                for e in hub.faults
                if line.startswith(e.split()[0]) and path.endswith(e.split()[1])
            )
            queue = next((hub.faults[e] for e in ends if hub.faults[e]), None)
            fault = queue.pop(0) if queue else None
        if isinstance(fault, int):
            extra = {"Retry-After": "0"} if fault in (429, 503) else {}
            return self.reply(fault, b'{"error": "scripted"}', extra)
        if self.command in ("POST", "PUT"):
            return self.upload(path, body)
        if path.startswith("/api/"):
            return self.api(path)
        repo, found, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        files = hub.repos.get(repo)
        if not found or files is None:
            return self.missing("RepoNotFound")
        if revision not in ("main", hub.commit):
            return self.missing("RevisionNotFound")
        if name not in files:
            return self.missing("EntryNotFound")
        self.send_file(files[name], fault)

    def api(self, path):
        """/api/{datasets,models}/REPO[/revision/REV] and /api/.../REPO/tree/REV[/FOLDER]"""
        kind, _, rest = path.removeprefix("/api/").partition("/")
        rest, _, tree = rest.partition("/tree/")
        repo = rest.partition("/revision/")[0]
        key = f"datasets/{repo}" if kind == "datasets" else repo
        files = self.server.hub.repos.get(key)
        if files is None:
            return self.missing("RepoNotFound")
        if tree:
            folder = tree.partition("/")[2].rstrip("/")
            names = sorted(n for n in files if not folder or n.startswith(folder + "/"))
            if folder and not names:
                return self.missing("EntryNotFound")
            rows = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(files[n]),
                    "oid": hashlib.sha1(files[n]).hexdigest(),
                }
                for n in names
            ]
            return self.reply(200, json.dumps(rows).encode())
        about = {
            "id": repo,
            "sha": self.server.hub.commit,
            "private": repo in self.server.hub.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": n} for n in sorted(files)],
            "cardData": self.server.hub.cards.get(key),
        }
        self.reply(200, json.dumps(about).encode())

    def send_file(self, data, fault):
        size, status, extra = len(data), 200, {}
        extra["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        extra["X-Repo-Commit"] = self.server.hub.commit
        extra["X-Linked-Size"] = str(size)
        extra["X-Linked-Etag"] = extra["ETag"]
        extra["Accept-Ranges"] = "bytes"
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted[6:].partition("-")
            first, last = int(first or 0), int(last or size - 1)
            extra["Content-Range"] = f"bytes {first}-{last}/{size}"
            data, status = data[first : last + 1], 206
        if fault == "damage":
            data = bytes(len(data))
        if isinstance(fault, bytes):
            data = fault
        if fault == "truncate":
            data = data[: len(data) // 2]
        self.reply(status, data, extra, send=len(data) // 2 if fault == "drop" else None)

    def missing(self, code):
        extra = {"X-Error-Code": code, "X-Repo-Commit": self.server.hub.commit}
        self.reply(404, b'{"error": "not found"}', extra)

    def reply(self, status, body, extra=None, send=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])
        if send is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)


class Hub:
    def __init__(self, repos, faults, cards, token=None):
        self.repos, self.cards, self.token = repos, cards or {}, token
        self.private, self.stored, self.commit = set(), {}, COMMIT
        self.faults = {key: list(value) for key, value in (faults or {}).items()}
        self.requests, self.lock = Counter(), threading.Lock()
        self.connections = []  # the client keeps them open between requests

    def count(self, method, ending):
        """How many requests with this method asked for a path with this ending."""
        return sum(
            n
            for line, n in self.requests.items()
            if line.startswith(method) and line.endswith(ending)
        )


@contextlib.contextmanager
def serve(repos, faults=None, cards=None, token=None):
    """Serve repos ({key: {path: bytes}}) on a free local port; yields a Hub: .url, .requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(repos, faults, cards, token)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        for connection in hub.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def point_client_at(url, monkeypatch):
    """Make this process's huggingface_hub talk to url (HF_ENDPOINT is read at import only)."""
    import huggingface_hub.constants
    import huggingface_hub.file_download
    import huggingface_hub.hf_api

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            changed = url + template[template.index("/{repo_id}") :]
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", changed)
