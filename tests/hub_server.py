"""A server on this machine that speaks the Hugging Face hub's protocol, and misbehaves on request."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    "Repositories {id: {file: bytes}} at http://127.0.0.1:port; use in a `with` block."

    def __init__(self, repositories: dict):
        self.repositories, self.requests = repositories, []
        self.cut: dict[str, int] = {}  # file: how many more answers break off in the middle
        self.busy = 0  # how many more requests are answered with 503
        self.altered: dict[str, bytes] = {}  # file: what is sent in place of what was announced
        self.closed: dict[str, tuple] = {}  # repository: (status, error code)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest()

    def answer(self, request):
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        if self.busy:
            self.busy -= 1
            return self.send(request, 503, b"busy")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^?]+)(\?.*)?", request.path):
            return self.describe(request, *found.groups()[:2])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^?/]+)(\?.*)?", request.path):
            return self.list_files(request, found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
            return self.deliver(request, *found.groups())
        return self.send(request, 404, b"")

    def describe(self, request, name, revision):
        "What is in a repository."
        if name in self.closed:
            status, code = self.closed[name]
            return self.send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        if name not in self.repositories:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", self.commit(name)):
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": file} for file in self.repositories[name]]
        about = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": self.commit(name),
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": files,
        }
        return self.send(request, 200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def list_files(self, request, name):
        "The files with their hashes, as newer versions of huggingface_hub ask for them."
        files = []
        for file, data in self.repositories[name].items():
            entry = {"type": "file", "path": file, "size": len(data), "oid": self.git_hash(data)}
            if self.is_large(file):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            files.append(entry)
        return self.send(request, 200, json.dumps(files).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def is_large(file: str) -> bool:
        return file.endswith((".safetensors", ".pt"))

    @staticmethod
    def git_hash(data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def deliver(self, request, name, revision, file):
        "One file, or the rest of it from where an earlier answer broke off."
        if file not in self.repositories.get(name, {}):
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.repositories[name][file]
        etag = hashlib.sha256(data).hexdigest() if self.is_large(file) else self.git_hash(data)
        data = self.altered.get(file, data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit(name), "Accept-Ranges": "bytes"}
        status, wanted = 200, request.headers.get("Range")
        if wanted and request.command == "GET":
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        cut = request.command == "GET" and self.cut.get(file, 0) > 0
        if cut:
            self.cut[file] -= 1
        return self.send(request, status, data, headers, cut)

    def send(self, request, status, data, headers=(), cut=False):
        request.send_response(status)
        for key, value in dict(headers).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            request.wfile.flush()
            request.close_connection = True
