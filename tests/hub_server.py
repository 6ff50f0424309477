"""A server on loopback with the part of the Hugging Face hub's API that libraries use to load a model or dataset by id.

It serves file metadata and downloads (https://huggingface.co/docs/hub/api), repository info and trees, revisions, the
dataset viewer's `/info`, and errors with their X-Error-Code.

HF_ENDPOINT and the proxy variables point to it, so that requests to any other host arrive here, too, and are refused.
"""

import contextlib
import hashlib
import json
import socket
import threading
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_accepted"  # the token of a user with access to gated repositories
BIG = (".safetensors", ".bin", ".gz", ".parquet")  # served by a redirect, as LFS files are


@dataclass
class Repository:
    """A model or a dataset: files by path for each commit, and the commits of branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    viewer_info: dict | None = None  # the dataset viewer's information, by config

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Commit these files to a branch or tag; return the commit's id."""
        parts = [f"{path}\0{hashlib.sha1(content).hexdigest()}" for path, content in sorted(files.items())]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a commit id."""
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubAddress:
    """A reserved address at which hubs can be started one after the other, and the HF_HOME of their clients.

    While no hub runs, connections are refused.
    """

    def __init__(self, home: Path):
        self.home, self.reservation = home, socket.socket()
        self.reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.reservation.bind(("127.0.0.1", 0))
        self.port = self.reservation.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return variables that make a process use this hub, keep its cache in `home`, and reach no other host."""
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.url)
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
        return {**names, **proxies, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "ALL_PROXY": "", "all_proxy": ""}


class _Server(ThreadingHTTPServer):
    allow_reuse_port = True  # a `HubAddress` reserves the port


class Hub:
    """The server: `with Hub(address) as hub`, `hub.repository("models", "owner/name").commit({...})`.

    `requests` lists requests as (method, path, Range header or None); the path of a download is ID#FILE. The next
    download of the file `name` breaks off after `cut_off[name]` bytes, and then `on_cut_off` is called. Requests whose
    path contains `word` are answered with `status[word]`, a status and an X-Error-Code.
    """

    def __init__(self, address: HubAddress):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_off: dict[str, int] = {}
        self.on_cut_off = lambda: None
        self.status: dict[str, tuple[int, str]] = {}
        self.connections: set[socket.socket] = set()
        self.server = _Server(("127.0.0.1", address.port), type("Handler", (_Handler,), {"hub": self}))
        self.url = address.url

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Go offline: refuse new connections and break off open ones."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def repository(self, kind: str, repo_id: str, **kwargs) -> Repository:
        """Return the repository with this id, created if needed. `kind`: models or datasets."""
        return self.repositories.setdefault((kind, repo_id), Repository(**kwargs))

    def downloads(self) -> Counter:
        """Count how often each file was sent from its beginning, by its name in the repository."""
        sent = [path for method, path, start in self.requests if method == "GET" and "#" in path and start is None]
        return Counter(path.split("#", 1)[1] for path in sent)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self):
        self.hub.connections.add(self.request)
        super().setup()

    def finish(self):
        self.hub.connections.discard(self.request)
        with contextlib.suppress(OSError):  # the client may have gone
            super().finish()

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._handle()

    def do_GET(self):
        self._handle()

    def do_POST(self):
        self._handle(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_CONNECT(self):  # a request to another host, through the proxy
        self.hub.requests.append(("CONNECT", self.path, None))
        self._error(403, "")

    def _handle(self, body: bytes = b""):
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.request_index = len(self.hub.requests)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        for word, (status, code) in self.hub.status.items():
            if word in path:
                return self._error(status, code)
        if url.hostname is not None and url.hostname.startswith("datasets-server."):
            return self._viewer(urllib.parse.parse_qs(url.query))
        if url.hostname is not None:
            return self._error(403, "")
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            return self._content(parts[1], "/".join(parts[2:4]), parts[4], "/".join(parts[5:]))
        if parts[0] == "api":
            return self._api(parts[1], parts[2:], url.query, body)
        kind = "datasets" if parts[0] == "datasets" else "models"
        return self._resolve(kind, parts[1:] if kind == "datasets" else parts)

    # ---- files ------------------------------------------------------------------------------------------------------

    def _resolve(self, kind: str, parts: list[str]):
        """Answer /{id}/resolve/{revision}/{path} with the file's location and metadata."""
        cut = parts.index("resolve") if "resolve" in parts else 0
        repo_id, revision, path = "/".join(parts[:cut]), "/".join(parts[cut + 1 : cut + 2]), "/".join(parts[cut + 2 :])
        repository, sha = self._open(kind, repo_id, revision)
        if repository is None:
            return None
        if path not in repository.commits[sha]:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        headers = self._describe(repository.commits[sha][path], sha)
        if path.endswith(BIG):
            location = f"{self.hub.url}/cdn/{kind}/{repo_id}/{sha}/{path}"
            linked = {"X-Linked-Size": headers.pop("Content-Length"), "X-Linked-Etag": headers.pop("ETag")}
            return self._send(302, b"", {**headers, **linked, "Location": location})
        if "resolve-cache" not in self.path and kind == "models":  # the hub, too, serves small files from the same host
            location = f"/api/resolve-cache/{kind}/{repo_id}/{sha}/{path}"
            return self._send(307, b"", {**headers, "Content-Length": "0", "Location": location})
        return self._content(kind, repo_id, sha, path)

    def _describe(self, content: bytes, sha: str) -> dict[str, str]:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return {"ETag": etag, "X-Repo-Commit": sha, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}

    def _content(self, kind: str, repo_id: str, sha: str, path: str):
        """Send a file, or the requested Range of it; break off as `cut_off` says."""
        method, _, start = self.hub.requests[self.request_index]
        self.hub.requests[self.request_index] = (method, f"{repo_id}#{path}", start)
        content = self.hub.repositories[kind, repo_id].commits[sha][path]
        headers, status = self._describe(content, sha), 200
        if start is not None:
            first = int(start.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        if self.command == "GET" and (n_bytes := self.hub.cut_off.pop(path, None)) is not None:
            self._send(status, content[:n_bytes], {**headers, "Content-Length": str(len(content))})
            self.close_connection = True
            return self.hub.on_cut_off()
        return self._send(status, content, {**headers, "Content-Length": str(len(content))})

    # ---- repositories -----------------------------------------------------------------------------------------------

    def _open(self, kind: str, repo_id: str, revision: str) -> tuple[Repository, str] | tuple[None, None]:
        """Return the repository and the commit if this user may see them; otherwise answer with the reason."""
        repository = self.hub.repositories.get((kind, repo_id))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None:
            # to users who aren't logged in, the hub doesn't tell missing repositories from private ones
            self._error(404 if token else 401, "RepoNotFound", message="Repository not found")
        elif repository.gated and token != TOKEN and "/api/" not in self.path:  # the list of files is public
            message = f"Access to {kind.removesuffix('s')} {repo_id} is restricted."
            self._error(403 if token else 401, "GatedRepo", message=message)
        elif (sha := repository.resolve(revision)) is None:
            self._error(404, "RevisionNotFound", message=f"Invalid rev id: {revision}")
        else:
            return repository, sha
        return None, None

    def _api(self, kind: str, parts: list[str], query: str, body: bytes):
        """Answer /api/{kind}/{id}, .../revision/{revision}, .../tree/{revision}/{path}, .../paths-info/{revision}."""
        if kind == "resolve-cache":
            return self._resolve(parts[0], [*parts[1:3], "resolve", *parts[3:]])
        repo_id, call = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision"
        revision = parts[3] if len(parts) > 3 else "main"
        repository, sha = self._open(kind, repo_id, revision)
        if repository is None:
            return None
        files = repository.commits[sha]
        if call == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            info = {"_id": sha[:24], "id": repo_id, "sha": sha, "private": False, "disabled": False, "tags": []}
            gated = "manual" if repository.gated else False
            return self._json({**info, "gated": gated, "downloads": 0, "likes": 0, "siblings": siblings})
        entries = _tree(files)
        if call == "tree":
            folder = "/".join(parts[4:])
            within = [e for e in entries if e["path"].startswith(f"{folder}/" if folder else "")]
            if "recursive=true" not in query.lower():
                depth = folder.count("/") + 2 if folder else 1
                within = [entry for entry in within if entry["path"].count("/") + 1 == depth]
            return self._json(within) if within or not folder else self._error(404, "EntryNotFound")
        if call == "paths-info":
            wanted = urllib.parse.parse_qs(body.decode())["paths"] if b"paths=" in body else json.loads(body)["paths"]
            return self._json([entry for entry in entries if entry["path"] in wanted])
        return self._error(404, "")

    def _viewer(self, query: dict[str, list[str]]):
        repository = self.hub.repositories.get(("datasets", query["dataset"][0]))
        if repository is None or repository.viewer_info is None or not self.path.split("?")[0].endswith("/info"):
            return self._error(404, "ResponseNotFound")
        info = {"dataset_info": repository.viewer_info, "pending": [], "failed": [], "partial": False}
        return self._json(info, {"X-Revision": repository.refs["main"]})

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _json(self, value: object, headers: dict[str, str] | None = None):
        content = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        self._send(200, content, headers)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None, message: str = ""):
        named = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, b"", {"Content-Length": "0", **named, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(files: dict[str, bytes]) -> list[dict]:
    """Return files and folders as the hub lists them."""
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
    for path, content in files.items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(BIG):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["path"])
