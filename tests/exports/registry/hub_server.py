"""A small Hugging Face Hub in memory: the calls that huggingface_hub makes when releases are published and pulled.

Large files go through Git LFS (batch API, parts, verification), as on a Hub without Xet. Storage and downloads of large files
have another host name than the Hub, as they have in reality.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.exports.registry.serving import Connection, running

Files = dict[str, bytes | tuple[str, int]]  # a large file: its sha256 and size


@dataclass
class Repository:
    """``commits``: files by commit; ``branches`` and ``tags``: commits by name."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Let a branch have these files."""
        made = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[made] = files
        self.branches[branch] = made
        return made

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit's own name."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None


class Server(ThreadingHTTPServer):
    """``repositories`` by name, ``blobs`` (large files) by sha256, ``log`` of (method, path), ``token``: must be sent.

    ``chunk``: larger files are sent in parts of this size. ``stored``: bytes that came to storage. ``leaks``: storage that was
    shown a token. ``before_commit(name, branch)`` is called once, before a commit's parent is looked at.
    """

    daemon_threads = True

    def __init__(self, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[tuple[str, str]] = []
        self.leaks: list[str] = []
        self.token, self.readonly, self.chunk, self.stored = token, False, 20_000, 0
        self.before_commit: Callable[[str, str], None] | None = None
        self.lock = threading.RLock()


class Handler(Connection):
    """One connection."""

    server: Server

    def handle_all(self) -> None:
        """Answer one request."""
        server, path = self.server, unquote(self.path.partition("?")[0])
        server.log.append((self.command, path))
        self.query = parse_qs(self.path.partition("?")[2])
        if match := re.fullmatch(r"/(?:storage|cdn)/([0-9a-f]{64})(?:/(\d+))?", path):
            if "Authorization" in self.headers:
                server.leaks.append(path)
            return (
                self.part(match[1], int(match[2] or 1)) if self.command == "PUT" else self.content(server.blobs.get(match[1]))
            )
        data = self.body()
        signed = path.endswith("/lfs/complete")
        if server.token and not signed and self.headers.get("Authorization") != f"Bearer {server.token}":
            wrong = "Authorization" in self.headers
            headers = {"X-Error-Message": "Invalid credentials in Authorization header" if wrong else "Access is refused"}
            if not wrong and path.startswith("/api/models/"):
                headers["X-Error-Code"] = "RepoNotFound"
            return self.answer(401, b"{}", headers)
        if server.readonly and (path.startswith("/api/repos/") or "/commit/" in path or "/batch" in path):
            return self.told({"error": "You have no right to write here"}, 403)
        if path == "/api/whoami-v2":
            return self.told({"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            return self.told({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/models":
            names = [name for name in server.repositories if name.startswith(self.query["author"][0] + "/")]
            return self.told([{"id": name, "modelId": name} for name in sorted(names)])
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(\w[\w-]*)(?:/(.*))?", path)
        repository = server.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if match[2] == "commit" and (hook := server.before_commit):
            server.before_commit = None
            hook(match[1], match[3])
        with server.lock:
            answer: Callable[..., None] = getattr(self, match[2].replace("-", "_"))
            return answer(match[1], repository, match[3] or "", data)

    def told(self, value: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def create(self, asked: dict[str, Any]) -> None:
        """A repository with a first commit."""
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = {"url": f"http://127.0.0.1/{name}"}
        if name in self.server.repositories:
            return self.told({"error": "You already created this model repo", **url}, 409)
        made = self.server.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.told(url)

    def refs(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Branches and tags."""
        listed = {
            kind: [{"name": each, "ref": f"refs/{place}/{each}", "targetCommit": commit} for each, commit in held.items()]
            for kind, place, held in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        self.told({**listed, "converts": []})

    def preupload(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Which files are large, and what is at their places now."""
        commit = repository.find(rest)
        if commit is None:
            return self.missing_revision()
        held, told = repository.commits[commit], []
        for each in json.loads(data)["files"]:
            large = each["path"].endswith((".safetensors", ".gguf")) or each["size"] > 10_000_000
            there = held.get(each["path"])
            oid = None if there is None else there[0] if isinstance(there, tuple) else _git(there)
            told.append({"path": each["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return self.told({"files": told})

    def info(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Git LFS: the batch API, the end of an upload in parts, and verification."""
        asked = json.loads(data)
        here = f"http://{self.headers['Host']}/{name}.git/info/lfs"
        if rest == "lfs/complete":
            return self.complete(asked)
        if rest == "lfs/verify":
            whole = len(self.server.blobs.get(asked["oid"], b"")) == asked["size"]
            return self.told({}, 200 if whole else 422)
        storage = f"http://localhost:{self.headers['Host'].partition(':')[2]}/storage"
        told = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            if oid in self.server.blobs:
                told.append({"oid": oid, "size": size})
                continue
            upload: dict[str, Any] = {"href": f"{storage}/{oid}?X-Signature=signed"}
            if size > self.server.chunk:
                count = -(-size // self.server.chunk)
                parts = {str(number): f"{storage}/{oid}/{number}?X-Signature=signed" for number in range(1, count + 1)}
                upload = {"href": f"{here}/complete", "header": {"chunk_size": str(self.server.chunk), **parts}}
            told.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{here}/verify"}}})
        return self.told({"transfer": "multipart", "objects": told})

    def part(self, oid: str, number: int) -> None:
        """Storage: one part, or the whole of a small file."""
        data = self.body()
        self.server.stored += len(data)
        if self.path.partition("?")[0].endswith(f"{oid}"):
            if hashlib.sha256(data).hexdigest() != oid:
                return self.answer(400)
            self.server.blobs[oid] = data
        else:
            self.server.parts.setdefault(oid, {})[number] = data
        return self.answer(200, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def complete(self, asked: dict[str, Any]) -> None:
        """The end of an upload in parts."""
        if asked["oid"] in self.server.blobs:  # another publisher's upload of the same file ended first
            return self.told({})
        parts = self.server.parts.pop(asked["oid"])
        tags = [f'"{hashlib.md5(parts[each["partNumber"]]).hexdigest()}"' for each in asked["parts"]]
        data = b"".join(parts[number] for number in sorted(parts))
        if tags != [each["etag"] for each in asked["parts"]] or hashlib.sha256(data).hexdigest() != asked["oid"]:
            return self.answer(400, b"{}")
        self.server.blobs[asked["oid"]] = data
        return self.told({})

    def commit(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Files come and go in one commit, if its parent is the branch's."""
        lines = [json.loads(line) for line in data.splitlines()]
        head = repository.branches.get(rest)
        if head is None:
            return self.missing_revision()
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, head):
            return self.told({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.told({"error": f"LFS object {value['oid']} is missing"}, 400)
                files[value["path"]] = (value["oid"], len(self.server.blobs[value["oid"]]))
            else:
                del files[value["path"]]
        made = repository.commit(rest, files)
        return self.told({"commitUrl": f"http://127.0.0.1/{name}/commit/{made}", "commitOid": made, "pullRequestUrl": None})

    def branch(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Make or remove a branch."""
        self.reference(repository, repository.branches, rest, json.loads(data or b"{}").get("startingPoint", "main"))

    def tag(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Make or remove a tag."""
        deleted = self.command == "DELETE"
        self.reference(repository, repository.tags, rest if deleted else json.loads(data)["tag"], rest)

    def reference(self, repository: Repository, held: dict[str, str], name: str, start: str) -> None:
        """Make a branch or a tag, or remove it."""
        if self.command == "DELETE":
            return self.told({}) if held.pop(name, None) else self.missing_revision()
        commit = repository.find(start)
        if commit is None:
            return self.missing_revision()
        if name in held:
            return self.told({"error": "Reference already exists"}, 409)
        held[name] = commit
        return self.told({})

    def tree(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """All files of a revision."""
        self.listed(repository, rest, None)

    def paths_info(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """Some files of a revision."""
        self.listed(repository, rest, parse_qs(data.decode()).get("paths", []))

    def listed(self, repository: Repository, revision: str, names: list[str] | None) -> None:
        """What the Hub says of files."""
        commit = repository.find(revision)
        if commit is None:
            return self.missing_revision()
        told = []
        for path, held in repository.commits[commit].items():
            if names is not None and path not in names:
                continue
            if isinstance(held, tuple):
                lfs = {"oid": held[0], "size": held[1], "pointerSize": 130}
                told.append({"type": "file", "path": path, "size": held[1], "oid": _git(held[0].encode()), "lfs": lfs})
            else:
                told.append({"type": "file", "path": path, "size": len(held), "oid": _git(held)})
        return self.told(told)

    def revision(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """What is at a revision."""
        commit = repository.find(rest)
        self.missing_revision() if commit is None else self.told({"id": name, "sha": commit})

    def resolve(self, name: str, repository: Repository, rest: str, data: bytes) -> None:
        """A file's bytes, or where they are."""
        revision, _, path = rest.partition("/")
        commit = repository.find(revision)
        if commit is None:
            return self.missing_revision()
        held = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if held is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", **headers})
        if isinstance(held, bytes):
            return self.content(held, {"ETag": f'"{_git(held)}"', **headers})
        headers |= {"X-Linked-ETag": f'"{held[0]}"', "X-Linked-Size": str(held[1])}
        port = self.headers["Host"].partition(":")[2]
        return self.answer(302, b"", {"Location": f"http://localhost:{port}/cdn/{held[0]}?X-Signature=signed", **headers})

    def content(self, data: bytes | None, headers: dict[str, str] | None = None) -> None:
        """Bytes, from the place on that a range asks for."""
        if data is None:
            return self.answer(404, b"")
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self.answer(206, data[start:], {**(headers or {}), **span})
        return self.answer(200, data, headers)

    def missing_revision(self) -> None:
        """No such branch, tag or commit."""
        self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub_server(token: str | None = None) -> Iterator[Server]:
    """A server that runs until the block ends."""
    with running(Server(token)) as server:
        yield server
