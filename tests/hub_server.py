"""A stand-in of the Hugging Face hub on this machine: the routes that huggingface_hub asks for."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


def git_sum(content):
  return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
  """Repositories as {"owner/name": {"main": {file: bytes}}}; each revision is one commit.

  Attributes:
    repositories: what is there; a test may change it.
    wrong: (repository, file) whose bytes are sent with the last one changed.
    private: the repositories that were created as private.
    gated: repositories that refuse to whoever asks.
    fetched: the files whose bytes were asked for.
    down: whether every answer is that the server is not available.
  """

  def __init__(self):
    self.repositories, self.wrong, self.private, self.gated = {}, set(), set(), set()
    self.fetched = []
    self.down = False

  def put(self, repository, files, revision="main"):
    self.repositories.setdefault(repository, {})[revision] = {
      name: content if isinstance(content, bytes) else content.encode()
      for name, content in files.items()
    }

  def commit(self, repository, revision):
    files = self.repositories[repository][revision]
    listing = sorted((name, git_sum(content)) for name, content in files.items())
    return hashlib.sha1(repr((repository, listing)).encode()).hexdigest()

  def revision(self, repository, asked):
    """The branch that is meant by its name or its commit; None for none."""
    branches = self.repositories[repository]
    return next((b for b in branches if asked in (b, self.commit(repository, b))), None)


def is_large(name):
  """Whether the hub keeps a file as LFS, known by its SHA-256."""
  return name.endswith((".safetensors", ".bin", ".npz")) or "/d/" in name


@contextlib.contextmanager
def serving():
  """(the hub, its address) of a server that ends with the block."""
  hub = Hub()

  class Handler(_Handler):
    pass

  Handler.hub = hub
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub, f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def use(monkeypatch, address, cache):
  """Lets huggingface_hub, in this process, ask that server and keep files in `cache`."""
  from huggingface_hub import constants

  template = address + "/{repo_id}/resolve/{revision}/{filename}"
  monkeypatch.setattr(constants, "ENDPOINT", address)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(http.server.BaseHTTPRequestHandler):
  hub: Hub
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self._resolve()

  def do_GET(self):
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
    if match is None:
      self._resolve()
      return
    repository, revision = match[1], match[2] or "main"
    if (files := self._files(repository, revision)) is None:
      return
    siblings = []
    for name, content in files.items():
      entry = {"rfilename": name, "size": len(content), "blobId": git_sum(content)}
      if is_large(name):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
      siblings.append(entry)
    branch = self.hub.revision(repository, revision)
    about = {"id": repository, "sha": self.hub.commit(repository, branch), "siblings": siblings}
    self._send({**about, "private": repository in self.hub.private})

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"] or 0))
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    if self.hub.down:
      self._send({}, 503)
    elif path == "/api/repos/create":
      asked = json.loads(body)
      name = f"{asked.get('organization') or 'me'}/{asked['name']}"
      if name in self.hub.repositories:
        self._send({"error": "You already created this model repo"}, 409)
        return
      self.hub.put(name, {".gitattributes": ""})
      # Older versions of the library say it in another way.
      if asked.get("private") or asked.get("visibility") == "private":
        self.hub.private.add(name)
      self._send({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
    elif path == "/api/validate-yaml":
      self._send({"errors": [], "warnings": []})
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
      branches = self.hub.repositories[match[1]]
      branches[match[2]] = dict(branches["main"])
      self._send({})
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
      files = json.loads(body)["files"]
      chosen = [
        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
        for f in files
      ]
      self._send({"files": chosen})
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
      self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
    else:
      self._send({"error": f"no route {path}"}, 404)

  def _commit(self, repository, branch, lines):
    files = self.hub.repositories[repository][branch]
    for line in lines:
      value = line["value"]
      if line["key"] == "header" and value.get("parentCommit") not in (
        None,
        self.hub.commit(repository, branch),
      ):
        self._send({"error": "A commit has happened since"}, 412)
        return
      if line["key"] == "file":
        files[value["path"]] = base64.b64decode(value["content"])
      elif line["key"] == "deletedFile":
        del files[value["path"]]
    commit = self.hub.commit(repository, branch)
    self._send(
      {
        "commitOid": commit,
        "commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{commit}",
      }
    )

  def _resolve(self):
    # A revision with a slash is one part of the path, in which that is quoted.
    path = urllib.parse.urlsplit(self.path).path
    match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    if match is None:
      self._send({"error": f"no route {path}"}, 404)
      return
    repository, revision, name = map(urllib.parse.unquote, match.groups())
    if (files := self._files(repository, revision)) is None:
      return
    if name not in files:
      self._send({}, 404, {"X-Error-Code": "EntryNotFound"})
      return
    content = files[name]
    headers = {
      "X-Repo-Commit": self.hub.commit(repository, self.hub.revision(repository, revision)),
      "ETag": f'"{hashlib.sha256(content).hexdigest() if is_large(name) else git_sum(content)}"',
      "Content-Type": "application/octet-stream",
    }
    if (repository, name) in self.hub.wrong:
      content = content[:-1] + bytes([content[-1] ^ 1])
    if self.command == "GET":
      self.hub.fetched.append(name)
    self._send(content, 200, headers)

  def _files(self, repository, revision):
    """The files of a revision; None where there is none, which has been said."""
    if self.hub.down:
      self._send({"error": "down"}, 503)
    elif repository not in self.hub.repositories:
      self._send({}, 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
    elif repository in self.hub.gated:
      self._send({}, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
    elif (branch := self.hub.revision(repository, revision)) is None:
      self._send({}, 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"})
    else:
      return self.hub.repositories[repository][branch]
    return None

  def _send(self, content, status=200, headers=None):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)
