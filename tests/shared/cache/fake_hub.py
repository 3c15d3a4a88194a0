"""A local server that speaks as much of the Hugging Face Hub as pushing and pulling a dataset repository needs.

Repositories live in memory: commits of files, large ones behind LFS objects that are uploaded on their own and downloaded
by a redirect. `Hub.damage` and `Hub.cut` make it misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
READ_ONLY = "hf_readonly"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Hub:
    """What the server knows, and how it misbehaves."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    damage: str = ""  # a file that is served with another last byte
    cut: int = 0  # answers with files that are still to be cut off in the middle
    fail_commits_after: int = 10**9

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo]
        return repository.commits[repository.branches.get(revision, revision)]


def is_large(path: str) -> bool:
    return path.endswith(".parquet")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    # --- answers ---

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str, message: str = "no") -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def revision_of(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit; None: an error was sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token not in (TOKEN, READ_ONLY)):
            self.fail(404 if self.token else 401, "RepoNotFound")
            return None
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self.fail(404, "RevisionNotFound")
            return None
        return repository, sha

    # --- requests ---

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("_")[0].split("|"):
                self.hub.requests[method] += 1
                getattr(self, method.split("_", 1)[1])(*match.groups())
                return
        self.fail(404, "EntryNotFound", f"no such page: {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def create(self) -> None:
        asked = json.loads(self.body())
        if self.token != TOKEN:
            self.fail(403 if self.token else 401, "", "You don't have the rights")
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        private = asked.get("private") or asked.get("visibility") == "private"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[name] = Repository(bool(private))
            self.hub.repositories[name].commit("main", {".gitattributes": b"*.parquet filter=lfs"})
        self.answer(status, {"url": f"{self.hub.address}/datasets/{name}", "name": name, "id": name})

    def whoami(self) -> None:
        self.answer(200, {"name": "me", "type": "user", "orgs": []})

    def validate(self) -> None:
        content = json.loads(self.body())["content"]
        ok = content.startswith("---\n")
        self.answer(200 if ok else 400, {"errors": [] if ok else [{"message": "no metadata"}], "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        self.body()
        repository = self.hub.repositories[name]
        status = 409 if branch in repository.branches else 200
        repository.branches.setdefault(branch, repository.branches["main"])
        self.answer(status, {})

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())
        found = self.revision_of(name, revision)
        if found is None:
            return
        files = found[0].commits[found[1]]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(f["path"], files[f["path"]]) if f["path"] in files else None,
            }
            for f in asked["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, name: str) -> None:
        answers = []
        for wanted in json.loads(self.body())["objects"]:
            item = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}
            answers.append(item)
        self.answer(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.fail(400, "", "not the object that was announced")
            return
        self.hub.objects[oid] = data
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        found = self.revision_of(name, revision)
        if found is None:
            return
        if self.token != TOKEN:
            self.fail(403, "", "read only")
            return
        if self.hub.requests["POST_commit"] > self.hub.fail_commits_after:
            self.fail(500, "", "out of order")
            return
        repository, sha = found
        files = dict(repository.commits[sha])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        new = repository.commit(revision, files)
        url = f"{self.hub.address}/datasets/{name}/commit/{new}"
        self.answer(200, {"success": True, "commitOid": new, "commitUrl": url})

    def info(self, name: str, revision: str | None = None) -> None:
        found = self.revision_of(name, revision or "main")
        if found is None:
            return
        files = found[0].commits[found[1]]
        siblings = [{"rfilename": path, "size": len(data), "blobId": _oid("", data)} for path, data in files.items()]
        self.answer(200, {"id": name, "sha": found[1], "private": found[0].private, "siblings": siblings, "tags": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.revision_of(name, revision)
        if found is None:
            return
        data = found[0].commits[found[1]].get(path)
        if data is None:
            self.fail(404, "EntryNotFound")
            return
        if self.hub.damage == path:
            data = data[:-1] + bytes([data[-1] ^ 1])
        oid, common = _oid(path, data), {"X_Repo_Commit": found[1], "Accept_Ranges": "bytes"}
        if is_large(path):
            self.hub.objects[oid] = data
            common |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data))}
            elsewhere = self.hub.address.replace("127.0.0.1", "localhost")  # as the Hub's large files are
            self.answer(302, b"", Location=f"{elsewhere}/lfs/{oid}", **common)
        elif self.command == "HEAD":
            self.send_response(200)
            for key, value in {**common, "ETag": f'"{oid}"', "Content-Length": str(len(data))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
        else:
            self.answer(200, data, ETag=f'"{oid}"', **common)

    def load(self, oid: str) -> None:
        data = self.hub.objects[oid]
        first = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            self.hub.ranges.append(asked[0])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("ETag", f'"{oid}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut:
            self.hub.cut -= 1
            self.wfile.write(data[first : first + (len(data) - first) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[first:])


def _oid(path: str, data: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", "POST_create"),
    (r"/api/whoami-v2", "GET_whoami"),
    (r"/api/validate-yaml", "POST_validate"),
    (rf"/api/datasets/{NAME}/branch/(.+)", "POST_branch"),
    (rf"/api/datasets/{NAME}/preupload/(.+)", "POST_preupload"),
    (rf"/api/datasets/{NAME}/commit/(.+)", "POST_commit"),
    (rf"/api/datasets/{NAME}/revision/(.+)", "GET_info"),
    (rf"/api/datasets/{NAME}", "GET_info"),
    (rf"/datasets/{NAME}\.git/info/lfs/objects/batch", "POST_batch"),
    (rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", "GET|HEAD_resolve"),
    (r"/lfs/(\w+)", "PUT_store"),
    (r"/lfs/(\w+)", "GET|HEAD_load"),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub in a thread."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
