"""A small Hugging Face Hub on 127.0.0.1: the endpoints that the real client needs to fetch and to push, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """A model repository: branches and pull requests -> commit, commit -> files."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        """Put a state of all files on a ref; its hash."""
        sha = hashlib.sha1(f"{ref} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.refs[ref], self.messages[sha] = dict(files), sha, message
        return sha

    def files(self, revision: str) -> dict[str, bytes]:
        """The files at a branch or commit."""
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Refusal(Exception):
    """An answer that is no success."""

    status: int
    code: str | None = None
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server and its state; use it as a context manager.

    Attributes:
        tokens: token -> (account, may write).
        repos: "owner/name" -> repository.
        lfs: whether safetensors go through LFS, as they do on the real one.
        refusal: every request is answered so while set.
        log: "METHOD path" of every request.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_write": ("alice", True), "hf_read": ("alice", False), "hf_other": ("bob", True)}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lfs = True
        self.refusal: Refusal | None = None
        self.log: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    # --- what a request does ---------------------------------------------------------------------------

    def account(self, headers: Any) -> tuple[str, bool]:
        """(account, may write) of the token that came with a request; ("", False) without one."""
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return self.tokens.get(token, ("", False))

    def find(self, name: str, account: str) -> Repo:
        """The repository, if the account may see it: absence and lack of permission look the same."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] != account):
            if account:
                raise Refusal(404, "RepoNotFound", "Repository not found")
            raise Refusal(401, None, "Invalid username or password.")
        return repo

    def writable(self, name: str, headers: Any) -> Repo:
        """The repository, if the token of the request may write to it."""
        account, write = self.account(headers)
        repo = self.find(name, account)
        if not write or name.split("/")[0] != account:
            raise Refusal(403 if account else 401, None, "You need write access to this repository")
        return repo

    def sha(self, repo: Repo, revision: str) -> str:
        """The commit that a revision means."""
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def get(self, path: str, headers: Any) -> tuple[Any, dict[str, str]]:
        """Answer of a GET or HEAD: JSON or bytes, and headers."""
        account, _ = self.account(headers)
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1] == "models":
            name, rest = "/".join(parts[2:4]), parts[4:]
            repo = self.find(name, account)
            if rest[:1] == ["refs"]:
                branches = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": s} for r, s in repo.refs.items()]
                return {"branches": branches, "tags": [], "converts": []}, {}
            sha = self.sha(repo, unquote(rest[1]) if len(rest) > 1 else "main")
            if rest[:1] == ["tree"]:
                return [self.entry(file, content) for file, content in repo.files(sha).items()], {}
            siblings = [{"rfilename": file} for file in repo.files(sha)]
            facts = {"private": repo.private, "gated": repo.gated, "tags": [], "downloads": 0, "likes": 0}
            return {"_id": name, "id": name, "modelId": name, "sha": sha, "siblings": siblings, **facts}, {}
        if parts[2:3] == ["resolve"]:
            name, file = "/".join(parts[:2]), "/".join(map(unquote, parts[4:]))
            repo = self.find(name, account)
            if repo.gated and account != name.split("/")[0]:
                raise Refusal(403 if account else 401, "GatedRepo", f"Access to model {name} is restricted.")
            sha = self.sha(repo, unquote(parts[3]))
            if file not in repo.files(sha):
                raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            content = repo.files(sha)[file]
            return content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        raise Refusal(404, None, "Not found")

    def entry(self, file: str, content: bytes) -> dict[str, Any]:
        """One file of a tree listing."""
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def post(self, path: str, query: dict[str, Any], body: bytes, headers: Any) -> tuple[Any, dict[str, str]]:
        """Answer of a POST or PUT."""
        parts = path.strip("/").split("/")
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != parts[1]:
                raise Refusal(400, None, "the content is not that of the oid")
            self.blobs[parts[1]] = body
            return {}, {}
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            base = [line.removeprefix("base_model:").strip() for line in front.splitlines() if "base_model:" in line]
            if any("/" not in name for name in base):
                error = f'"base_model" with value "{base[0]}" is not valid. Use a model id from the Hub.'
                return {"errors": [{"message": error}], "warnings": []}, {":status": "400"}
            return {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body), headers), {}
        if path.endswith(".git/info/lfs/objects/batch"):
            self.writable(path.strip("/").split(".git")[0], headers)
            return {"transfer": "basic", "objects": list(self.lfs_actions(json.loads(body)["objects"]))}, {}
        name, action, revision = "/".join(parts[2:4]), parts[4], unquote(parts[5])
        repo = self.writable(name, headers)
        if action == "branch":
            if revision in repo.refs:
                raise Refusal(409, None, "Reference already exists")
            repo.refs[revision] = repo.refs["main"]
            return {}, {}
        before = dict(repo.files(self.sha(repo, revision)))
        if action == "preupload":
            return {"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]}, {}
        assert action == "commit", path
        return self.commit(name, repo, revision, before, body, pull_request="create_pr" in query), {}

    def create(self, wanted: dict[str, Any], headers: Any) -> dict[str, Any]:
        """Make a repository."""
        account, write = self.account(headers)
        owner = wanted.get("organization") or account
        if not account:
            raise Refusal(401, None, "Invalid username or password.")
        if not write or owner != account:
            raise Refusal(403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        if name in self.repos:
            here = {"url": f"{self.url}/{name}", "name": name, "id": name}
            raise Refusal(409, None, "You already created this model repo", body=here)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repos[name] = Repo(private=private)
        self.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def mode(self, path: str) -> dict[str, Any]:
        """How a file is to be sent."""
        lfs = self.lfs and path.endswith(".safetensors")
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}

    def lfs_actions(self, objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Where each object is to be uploaded; none for one that is here."""
        for wanted in objects:
            here = wanted["oid"] in self.blobs
            yield wanted if here else {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

    def commit(
        self, name: str, repo: Repo, revision: str, files: dict[str, bytes], body: bytes, *, pull_request: bool
    ) -> dict[str, Any]:
        """Take the lines of a commit."""
        message = ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert item["key"] == "deletedFile", item["key"]
                del files[value["path"]]
        ref = f"refs/pr/{1 + sum(r.startswith('refs/pr/') for r in repo.refs)}" if pull_request else revision
        sha = repo.commit(ref, files, message)
        answer = {"success": True, "commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/{ref.rpartition('/')[2]}"
        return answer


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.log.append(f"{self.command} {url.path}")
        status, content, headers = 200, b"", {}
        try:
            if self.state.refusal is not None:
                raise self.state.refusal
            if self.command in ("GET", "HEAD"):
                found, headers = self.state.get(url.path, self.headers)
            else:
                found, headers = self.state.post(url.path, parse_qs(url.query), body, self.headers)
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            headers = {"Content-Type": "application/json", **headers}
            status = int(headers.pop(":status", 200))
        except Refusal as refusal:
            status = refusal.status
            content = json.dumps({"error": refusal.message, **refusal.body}).encode()
            headers = {"X-Error-Message": refusal.message, "Content-Type": "application/json", **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None:
        pass
