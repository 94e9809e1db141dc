"""Files of a repository of the Hugging Face hub: fetched into its cache and held to their sums.

fetch("hf:owner/name"), fetch("hf:owner/name@revision"), fetch("hf:owner/name@v1/file.pth")

A repository holds an authors' file of weights, which `weights.readers` reads, or an export of this
package, which `exports` reads. Where the hub cannot be reached, what the cache holds is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_vit.weights import kinds, stated_preprocessing

# As `sha256sum` writes it; over every file of an export that was pushed.
SUMS_FILE = "SHA256SUMS"
# What an export holds, see `exports`.
METADATA_FILE = "metadata.json"
WEIGHTS_FOLDER = "weights"
CARD_FILE = "README.md"

# Small files in which other libraries say how pictures are to be prepared.
_BESIDE = (stated_preprocessing.TIMM, stated_preprocessing.TRANSFORMERS)
_ADDRESS = re.compile(
  r"hf:(?://)?(?P<repository>[\w.-]+/[\w.-]+)"
  r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@\s]+))?(?:/(?P<path>[^@]+?))?/?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256, _GIT = "SHA-256", "git's SHA-1"


class HubError(ValueError):
  """Something that the hub or its cache does not give; the message says what would help."""


@dataclasses.dataclass(frozen=True)
class Fetched:
  """Weights of a repository, on this machine.

  Attributes:
    path: a file of weights (of several: their index), or the directory of an export.
    repository: "owner/name".
    commit: of the hub's history, 40 hexadecimal digits.
    licence: as the repository's card names it; "" where it names none.
  """

  path: Path
  repository: str
  commit: str
  licence: str

  @property
  def origin(self) -> dict[str, str]:
    """What metadata of weights keeps of it."""
    return {"repository": self.repository, "commit": self.commit, "licence": self.licence}


@dataclasses.dataclass(frozen=True)
class _Address:
  text: str
  repository: str
  revision: str
  path: str


@dataclasses.dataclass(frozen=True)
class _Listing:
  """One commit of a repository.

  Attributes:
    commit: 40 hexadecimal digits.
    sums: name of each file → the sums that the hub has of it, by their kind.
    get: name → the file on this machine.
  """

  commit: str
  sums: Mapping[str, Mapping[str, str]]
  get: Callable[[str], Path]


def is_address(place: Any) -> bool:
  """Whether it names a repository of the hub and no path."""
  return os.fspath(place).startswith("hf:")


def address_of(repository: str, revision: str | None = None) -> str:
  """The address of a repository's revision; None or "main" for the main one."""
  if revision in (None, "main"):
    return f"hf:{repository}"
  return f"hf:{repository}@{urllib.parse.quote(str(revision), safe='')}"


def local(place: str | os.PathLike, say: Callable[[str], None] = print) -> str:
  """A path as it is; an address as the path of what `fetch` fetched."""
  return str(fetch(place, say).path) if is_address(place) else os.fspath(place)


def fetch(address: str | os.PathLike, say: Callable[[str], None] = print) -> Fetched:
  """Fetches the weights of a repository, or finds them in the hub's cache.

  Args:
    address: "hf:owner/name", then perhaps "@" and a branch, tag or commit (a slash in it as "%2F"),
      then perhaps "/" and a file or folder in it.
    say: told the commit and the licence before anything large is fetched, and what is taken from
      the cache because the hub cannot be reached.

  Raises:
    HubError: no such address, repository, revision or file; several files of weights, none named;
      not in the cache, and the hub cannot be reached; or a file whose sum is not the hub's, or not
      the one that the export says.
    ModuleNotFoundError: huggingface_hub is not installed.
  """
  where = _parsed(os.fspath(address))
  hub = library(where.text)
  listing = _listed(hub, where, say)
  licence = _licence(listing)
  say(
    f"{where.text}: commit {listing.commit}, "
    + (f"licence {licence}" if licence else "its card names no licence: ask its owner for one")
  )
  path = _export(listing, where) or _file(listing, where)
  return Fetched(path, where.repository, listing.commit, licence)


def library(what: str) -> Any:
  """The module huggingface_hub.

  Raises:
    ModuleNotFoundError: it is not installed; the message says what needs it, and the command.
  """
  try:
    import huggingface_hub
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{what} needs huggingface_hub, which is not installed: pip install -e '.[hub]'"
    ) from error
  return huggingface_hub


def sha256sums(directory: Path, names: Sequence[str]) -> str:
  """The text of `SUMS_FILE` over files of a directory."""
  return "".join(f"{_digest(directory / name, _SHA256)}  {name}\n" for name in names)


def explained(error: Exception, repository: str, revision: str | None = None) -> HubError | None:
  """An answer of the hub in words; None where it gave none, so that it cannot be reached."""
  from huggingface_hub import errors

  if isinstance(error, errors.GatedRepoError):
    return HubError(
      f"{repository} is given to those who accept its terms: do so on its page, then log in by "
      "`hf auth login`"
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return HubError(
      f"the hub has no repository {repository}, or a private one: `hf auth login` logs in"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return HubError(f"{repository} has no branch, tag or commit {revision!r}")
  status = getattr(getattr(error, "response", None), "status_code", None)
  if isinstance(error, errors.HfHubHTTPError) and status is not None and status < 500:
    login = ", `hf auth login` logs in" if status in (401, 403) else ""
    return HubError(f"{repository}: the hub refuses{login}: {_line(error)}")
  return None


def transport_errors() -> tuple[type[Exception], ...]:
  """What requests raise that are refused, or never answered."""
  from huggingface_hub import errors

  # Which library carries the requests, and so what it raises, goes by huggingface_hub's version:
  # its own error of an answer is one of these.
  return (OSError, errors.HfHubHTTPError, *errors.HfHubHTTPError.__bases__)


def _parsed(text: str) -> _Address:
  match = _ADDRESS.fullmatch(text)
  path = (match and match["path"]) or ""
  if match is None or {"..", "."} & {*path.split("/"), *match["repository"].split("/")}:
    raise HubError(
      f"{text!r} is no address of the hub; hf:owner/name, hf:owner/name@revision or "
      "hf:owner/name@revision/file was expected"
    )
  revision = urllib.parse.unquote(match["revision"] or "main")
  return _Address(text, match["repository"], revision, path)


def _listed(hub: Any, where: _Address, say: Callable[[str], None]) -> _Listing:
  """The commit that the hub says, or that its cache has."""
  api = hub.HfApi()
  try:
    info = api.model_info(where.repository, revision=where.revision, files_metadata=True)
  except transport_errors() as error:
    answer = explained(error, where.repository, where.revision)
    if answer is not None:
      raise answer from error
    say(f"{where.text}: the hub cannot be reached ({_line(error)}); what is cached is taken")
    return _cached(where)
  sums = {}
  for entry in info.siblings or ():
    own = {_SHA256: entry.lfs.sha256} if entry.lfs else {_GIT: entry.blob_id}
    sums[entry.rfilename] = {kind: value for kind, value in own.items() if value}
  # The first file is asked for by the revision's name, by which the cache finds it offline.
  names = iter((where.revision,))

  def get(name: str) -> Path:
    try:
      path = Path(api.hf_hub_download(where.repository, name, revision=next(names, info.sha)))
    except transport_errors() as error:
      raise explained(error, where.repository, where.revision) or HubError(
        f"{name} of {where.repository} cannot be downloaded: {_line(error)}. Give the command "
        "again: whatever has come is kept"
      ) from error
    if info.sha not in path.parts:
      raise HubError(f"{where.repository} was changed just now: give the command again")
    return path

  return _Listing(info.sha, sums, get)


def _cached(where: _Address) -> _Listing:
  """The newest commit of the revision that was fetched before."""
  from huggingface_hub import constants
  from huggingface_hub.file_download import repo_folder_name

  cache = Path(constants.HF_HUB_CACHE)
  folder = cache / repo_folder_name(repo_id=where.repository, repo_type="model")
  reference = folder / "refs" / where.revision
  commit = reference.read_text().strip() if reference.is_file() else where.revision
  snapshot = folder / "snapshots" / commit
  advice = (
    f"give the same command with a network and without HF_HUB_OFFLINE, or set HF_HUB_CACHE (now "
    f"{cache}) to a cache that has it"
  )
  if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
    there = sorted(p.name for p in (folder / "snapshots").glob("*"))
    have = f", which has of it the commits {', '.join(there)}" if there else ""
    raise HubError(f"{where.repository} at {where.revision!r} is not in the cache{have}: {advice}")

  def get(name: str) -> Path:
    if not (snapshot / name).is_file():
      raise HubError(f"{name} of {where.repository} at {commit} is not in the cache: {advice}")
    return snapshot / name

  sums = {}
  for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
    # The cache calls what a link leads to by the hub's sum of it.
    stored = path.resolve().name if path.is_symlink() else ""
    kind = {64: _SHA256, 40: _GIT}.get(len(stored))
    sums[path.relative_to(snapshot).as_posix()] = {kind: stored} if kind else {}
  return _Listing(commit, sums, get)


def _licence(listing: _Listing) -> str:
  """What the card names; "" where there is no card, or it names none."""
  if CARD_FILE not in listing.sums:
    return ""
  from huggingface_hub.repocard import metadata_load

  try:
    card = metadata_load(_checked(listing, CARD_FILE)) or {}
  # Whatever is wrong in somebody's YAML.
  except Exception as error:
    if isinstance(error, HubError):
      raise
    return ""
  name = str(card.get("license") or "")
  if name in ("", "other"):
    parts = [str(card[key]) for key in ("license_name", "license_link") if card.get(key)]
    return " ".join(parts) or name
  return name


def _export(listing: _Listing, where: _Address) -> Path | None:
  """The directory of an export of this package, all of it; None where there is none."""
  base = f"{where.path}/" if where.path else ""
  members = [name for name in listing.sums if name.startswith(f"{base}{WEIGHTS_FOLDER}/")]
  if f"{base}{METADATA_FILE}" not in listing.sums or not members:
    return None
  said = {}
  if f"{base}{SUMS_FILE}" in listing.sums:
    lines = _checked(listing, f"{base}{SUMS_FILE}").read_text().splitlines()
    said = {base + name: digest for digest, _, name in (line.partition("  ") for line in lines)}
  for name in sorted({f"{base}{METADATA_FILE}", *members, *said}):
    path = _checked(listing, name)
    if name in said:
      _hold(path, name, _SHA256, said[name], f"{SUMS_FILE} beside it")
  return _checked(listing, f"{base}{METADATA_FILE}").parent


def _file(listing: _Listing, where: _Address) -> Path:
  """The file of weights; of several parts their index, with all of them beside it."""
  base = f"{where.path}/" if where.path else ""
  name = where.path
  if name not in listing.sums:
    inside = [n.removeprefix(base) for n in listing.sums if n.startswith(base)]
    found = kinds.weights_among(n for n in inside if "/" not in n)
    if len(found) != 1:
      raise HubError(_which(where, found, sorted(listing.sums)))
    name = base + found[0]
  folder = name.rpartition("/")[0]
  for beside in _BESIDE:
    if (about := f"{folder}/{beside}" if folder else beside) in listing.sums:
      _checked(listing, about)
  path = _checked(listing, name)
  if name.endswith(".index.json"):
    try:
      parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise HubError(
        f"{name} of {where.repository} is no index of a checkpoint in several files"
      ) from error
    for part in parts:
      _checked(listing, f"{folder}/{part}" if folder else part)
  return path


def _which(where: _Address, found: Sequence[str], names: Sequence[str]) -> str:
  """What to say where no file, or no single one, is meant."""
  base = f"{where.path}/" if where.path else ""
  at = address_of(where.repository, where.revision)
  if found:
    return (
      f"{where.text} holds several files of weights, name one, as {at}/{base}{found[0]}: "
      f"{', '.join(found[:8])}"
    )
  if where.path and not any(name.startswith(base) for name in names):
    near = ", ".join(names[:8]) or "nothing"
    return f"{where.repository} has no {where.path}; it has: {near}"
  deeper = [name for name in names if name.startswith(base) and kinds.weights_among([name])]
  if deeper:
    return (
      f"{where.text} holds its weights in folders, name one, as {at}/{deeper[0]}: "
      f"{', '.join(deeper[:8])}"
    )
  return (
    f"{where.text} holds no weights that are known here (safetensors, .pth, .bin, .npz, or an "
    f"export of this package); it has: {', '.join(names[:8]) or 'nothing'}"
  )


def _checked(listing: _Listing, name: str) -> Path:
  """A file of the commit, held to the hub's sums."""
  if name not in listing.sums:
    raise HubError(
      f"{name}, which other files name, is not among those of commit {listing.commit} that are here"
    )
  path = listing.get(name)
  for kind, value in listing.sums[name].items():
    _hold(path, name, kind, value, "the hub")
  return path


def _hold(path: Path, name: str, kind: str, expected: str, who: str) -> None:
  found = _digest(path, kind)
  if found != expected:
    raise HubError(
      f"{name} is not what it should be and is not used: its {kind} is {found}, {who} says "
      f"{expected}. Remove {path.resolve()} and give the command again"
    )


def _digest(path: Path, kind: str) -> str:
  # Files of any size that are no LFS are known by git's sum of them.
  sums = hashlib.sha256() if kind == _SHA256 else hashlib.sha1(usedforsecurity=False)
  if kind == _GIT:
    sums.update(f"blob {path.stat().st_size}\0".encode())
  with path.open("rb") as file:
    return hashlib.file_digest(file, lambda: sums).hexdigest()


def _line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
