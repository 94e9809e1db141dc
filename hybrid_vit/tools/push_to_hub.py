"""Weights of ours → a repository of the Hugging Face hub, with a card and the sums of its files.

python -m hybrid_vit.tools.push_to_hub runs/flowers owner/flowers --licence=apache-2.0
python -m hybrid_vit.tools.push_to_hub runs/flowers owner/flowers --dry_run=DIR

The repository is made where there is none, for its owner's eyes alone unless --public. One that
holds files is left as it is, unless --revision names a new branch for these, or --overwrite is
given, which replaces an earlier export (what was replaced stays in the history). With --dry_run all
that would be sent is written to DIR, to be read, and nothing is sent. The licence is that which the
weights came under, where their metadata says it; else --licence has to.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_vit import checkpoints, exports, hub
from hybrid_vit.fingerprints import first_nonfinite
from hybrid_vit.model_card import model_card
from hybrid_vit.paths import as_path
from hybrid_vit.standard_streams import run_tool

# What readers of weights take from a state's configuration; the rest is of the machine it ran on.
_KEPT = ("model", "task", "phases", "curriculum")


def prepare(
  directory: str | Path,
  folder: str | Path,
  repository: str,
  *,
  licence: str | None = None,
  revision: str | None = None,
) -> list[str]:
  """Writes what is to be sent: an export, its sums and its card.

  Args:
    directory: an export, a checkpoint or a work directory; see `checkpoints.load_weights`.
    folder: where to; new, or an earlier one of these.
    repository: "owner/name", for the card.
    licence: None for the one that the metadata names.
    revision: the branch, for the card; None for the main one.

  Returns:
    Names of the files.

  Raises:
    ValueError: no licence is known, or another one than the weights came under; weights that hold
      NaN or infinity; or `folder` holds something else.
    CheckpointError: no weights in `directory`, or `folder` cannot be written.
  """
  folder = Path(folder).expanduser()
  exports.heal(as_path(folder))
  if folder.exists() and any(folder.iterdir()) and not (folder / hub.SUMS_FILE).is_file():
    raise ValueError(f"{folder} holds something else; a new directory was expected")
  weights, metadata = checkpoints.load_weights(directory)
  if (bad := first_nonfinite(weights)) is not None:
    raise ValueError(f"the weights in {directory} hold NaN or infinity, first in {bad!r}")
  known = (metadata.get("source") or {}).get("licence")
  if known and licence not in (None, known):
    raise ValueError(
      f"--licence={licence}: the weights in {directory} came under {known}, which stays with them"
    )
  licence = licence or known
  if not licence:
    raise ValueError(
      f"nothing says under which licence the weights in {directory} are given: say it, as by "
      "--licence=apache-2.0"
    )
  address = hub.address_of(repository, revision)
  # Beside it first: an export without its sums would be taken for something else by the next call.
  new = folder.with_name(f"{folder.name}.unsent")
  checkpoints.export(new, weights, _published(metadata))
  # That it is there is all that orbax asks of it; what it says is a path of this machine.
  if (done := new / hub.WEIGHTS_FOLDER / "commit_success.txt").is_file():
    done.write_text("written whole\n")
  names = sorted(p.relative_to(new).as_posix() for p in new.rglob("*") if p.is_file())
  (new / hub.SUMS_FILE).write_text(hub.sha256sums(new, names))
  card = model_card(address, weights, metadata, licence)
  (new / hub.CARD_FILE).write_text(card)
  exports.put_in_place(as_path(new), as_path(folder))
  return [hub.CARD_FILE, hub.SUMS_FILE, *names]


def push(
  folder: str | Path,
  names: Sequence[str],
  repository: str,
  *,
  revision: str | None = None,
  public: bool = False,
  overwrite: bool = False,
) -> str:
  """Sends what `prepare` wrote, in one commit.

  Returns:
    The address of the commit's page.

  Raises:
    HubError: the repository holds files already and nothing says what is to become of them; it was
      changed meanwhile; or the hub refuses or cannot be reached.
    ModuleNotFoundError: huggingface_hub is not installed.
  """
  library = hub.library(f"pushing to {repository}")
  api, branch = library.HfApi(), revision or "main"
  try:
    info, made = _opened(api, repository, branch, public)
    there = [entry.rfilename for entry in info.siblings or ()]
    held = [name for name in there if name != ".gitattributes"]
    if held and not (made or overwrite):
      raise hub.HubError(
        f"{repository} holds {len(held)} files in {branch!r} already ({', '.join(held[:4])}…): "
        "--revision=BRANCH puts these into a new branch, --overwrite into their place"
      )
    old = {n for n in held if n.startswith(f"{hub.WEIGHTS_FOLDER}/")} - set(names)
    commit = api.create_commit(
      repository,
      [
        *(library.CommitOperationAdd(name, Path(folder) / name) for name in names),
        *(library.CommitOperationDelete(name) for name in sorted(old)),
      ],
      commit_message="Weights of hybrid_vit",
      revision=branch,
      # Whoever changed it since then is not overwritten.
      parent_commit=info.sha,
    )
  except hub.transport_errors() as error:
    raise hub.explained(error, repository, branch) or hub.HubError(
      f"{repository}: the hub cannot be reached: {error}"
    ) from error
  return str(commit.commit_url)


def _opened(api: Any, repository: str, branch: str, public: bool) -> tuple[Any, bool]:
  """What the hub says of the branch, and whether it is new: then it is made."""
  from huggingface_hub import errors

  try:
    info = api.model_info(repository)
    if public and info.private:
      raise hub.HubError(
        f"--public: {repository} is there and private; its settings on the hub change that"
      )
    made = False
  except errors.RepositoryNotFoundError as error:
    if isinstance(error, errors.GatedRepoError):
      raise
    api.create_repo(repository, private=not public)
    made = True
  try:
    return api.model_info(repository, revision=branch), made
  except errors.RevisionNotFoundError:
    api.create_branch(repository, branch=branch)
    return api.model_info(repository, revision=branch), True


def _published(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Metadata without paths of this machine."""
  published = dict(metadata)
  if "config" in published:
    published["config"] = {k: v for k, v in published["config"].items() if k in _KEPT}
  if "teacher" in published:
    published["teacher"] = {k: v for k, v in published["teacher"].items() if k != "path"}
  return published


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="push_to_hub", description=__doc__.splitlines()[0])
  parser.add_argument("weights", help="an export, a checkpoint or a work directory")
  parser.add_argument("repository", help="owner/name")
  parser.add_argument("--licence", help="such as apache-2.0; default: the weights' own")
  parser.add_argument("--revision", help="branch; default: main")
  parser.add_argument("--public", action="store_true", help="a new repository is for all to see")
  parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
  parser.add_argument("--dry_run", metavar="DIR", help="write all of it to DIR and send nothing")
  args = parser.parse_args(argv)
  try:
    with tempfile.TemporaryDirectory() as scratch:
      folder = Path(args.dry_run or Path(scratch) / "export")
      names = prepare(
        args.weights, folder, args.repository, licence=args.licence, revision=args.revision
      )
      for name in names:
        print(f"{(folder / name).stat().st_size:>14,}  {name}")
      if args.dry_run:
        print(f"written to {folder}; nothing was sent to {args.repository}")
        return 0
      place = push(
        folder,
        names,
        args.repository,
        revision=args.revision,
        public=args.public,
        overwrite=args.overwrite,
      )
  except (ValueError, OSError, ModuleNotFoundError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"sent: {place}")
  return 0


if __name__ == "__main__":
  run_tool(main)
