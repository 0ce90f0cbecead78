"""A hub of Hugging Face on this machine: the endpoints that its client asks, over HTTP."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves `repos`: files by repository, such as models/OWNER/NAME; and answers of errors."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]] = {}
    refused: dict[str, tuple[int, str]] = {}  # by repository: status and X-Error-Code
    cut: dict[str, int] = {}  # bytes after which a file's first transfer breaks off
    asked: list[str] = []

    def log_message(self, format, *args):
        """Print nothing."""

    def do_GET(self):
        """Answer a question on a repository, or send a file."""
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path)
        if found:
            return self._answer(f"{found[1]}/{found[2]}", found[3] or "")
        found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            kind = (found[1] or "models/").rstrip("/")
            return self._file(f"{kind}/{found[2]}", found[4])
        return self._send(404, b"{}")

    do_HEAD = do_POST = do_GET

    def _answer(self, repo, what):
        if repo in self.refused:
            status, code = self.refused[repo]
            return self._send(status, b"{}", {"X-Error-Code": code})
        files = self.repos.get(repo)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in files.items()
        ]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if what.startswith("tree/"):
            return self._json(self._tree(entries, what.split("/", 2)[2:]))
        if what.startswith("paths-info/"):
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else body.decode()
            return self._json([entry for entry in entries if entry["path"] in wanted])
        if what and not what.startswith("revision/"):
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": _etag(data)}
            for name, data in files.items()
        ]
        name = repo.partition("/")[2]
        info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False}
        return self._json({**info, "tags": [], "downloads": 0, "likes": 0, "disabled": False})

    def _tree(self, entries, below):
        """Return the files below a folder, or its own files and folders."""
        start = f"{below[0]}/" if below and below[0] else ""
        inside = [entry for entry in entries if entry["path"].startswith(start)]
        if "recursive=true" in urlsplit(self.path).query.lower():
            return inside
        names = dict.fromkeys(entry["path"].removeprefix(start).split("/")[0] for entry in inside)
        files = {entry["path"]: entry for entry in inside}
        folder = {"type": "directory", "size": 0, "oid": "0" * 40}
        return [files.get(start + name, {**folder, "path": start + name}) for name in names]

    def _file(self, repo, name):
        data = self.repos.get(repo, {}).get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        first = int(re.sub(r"\D", "", self.headers.get("Range", "").partition("-")[0]) or 0)
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        most = self.cut.pop(name, None) if self.command == "GET" else None
        return self._send(206 if first else 200, data[first:], headers, most=most)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers=None, *, most=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:most])
        if most is not None:
            self.close_connection = True


def _etag(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(repos, *, refused=(), cut=()):
    """Serve repositories; yields the address, and what was asked."""
    answers = {"repos": repos, "refused": dict(refused), "cut": dict(cut), "asked": []}
    hub = type("ThisHub", (Hub,), answers)
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub.asked
    finally:
        server.shutdown()
        server.server_close()
