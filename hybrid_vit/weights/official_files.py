"""The table of the authors' files of weights: what each is of, where it is, and its copies."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import importlib.resources
import re

OBTAINABLE = ("linked", "doubtful", "withdrawn")
# A whole repository with these weights alone; one with several files ("hub: …") names none.
_HUB_COPY = re.compile(r"(?:timm|transformers): ([\w.-]+/[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class OfficialFile:
  """A file of weights that the authors published.

  Attributes:
    family: file in `hybrid_vit/models/` of its network.
    architecture: name in the registry.
    file: its name; where the authors do not name it, what it is.
    address: of the file, or of the folder or page that gives it.
    sha256: its beginning, where the authors' name or tables give it; "" else.
    licence: of the weights.
    obtainable: "linked" (the authors' page links to it), "doubtful" (reports differ), "withdrawn".
    source: who says so.
    mirror: another place of the same numbers, perhaps under other names; "" for none known.
    notes: what one should know before using it.
  """

  family: str
  architecture: str
  file: str
  address: str
  sha256: str
  licence: str
  obtainable: str
  source: str
  mirror: str
  notes: str


def official_files(pattern: str = "*") -> list[OfficialFile]:
  """The files of all architectures that match a shell pattern."""
  table = importlib.resources.files("hybrid_vit.weights") / "official_files.csv"
  rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
  files = [OfficialFile(**row) for row in rows]
  return [file for file in files if fnmatch.fnmatchcase(file.architecture, pattern)]


def hub_copies(architecture: str) -> list[str]:
  """Addresses of the copies on the Hugging Face hub that the table names, of this network alone."""
  alone = (file for file in official_files(architecture) if "text tower" not in file.notes)
  copies = (_HUB_COPY.fullmatch(file.mirror) for file in alone)
  return [f"hf:{copy[1]}" for copy in copies if copy]
