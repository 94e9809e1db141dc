"""Authors' weights → variables of a network, and the metadata that users of them must know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_vit.hub import Fetched, fetch, is_address
from hybrid_vit.weights import architectures, families, readers
from hybrid_vit.weights.dense_checkpoints import ImportedDense
from hybrid_vit.weights.stated_preprocessing import stated_preprocessing


def import_network(
  source: str | Path | Fetched,
  architecture: str | None = None,
  *,
  num_classes: int | None = None,
  layout: str | None = None,
  average: bool | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> tuple[families.Imported, dict[str, Any]]:
  """Reads a file of weights as one network, or as a CLIP.

  Args:
    source: see `readers.read_checkpoint`.
    architecture: name in the registry, or of a CLIP; None for the one whose names and shapes the
      file has.
    num_classes: see `families.import_checkpoint`.
    layout: see there.
    average: see `readers.read_checkpoint`.
    arguments: attributes of the network that replace the registry's.

  Returns:
    (the numbers, metadata as `weights.stored.network_of` reads it). Pictures are prepared as files
    of timm or transformers beside the weights say, else as the registry does.

  Raises:
    ValueError: the file cannot be read, is of another network, or of several where `architecture`
      is None.
    ModuleNotFoundError: a library that is needed to read it is not installed.
  """
  if not isinstance(source, Fetched) and is_address(source):
    source = fetch(source)
  file = readers.read_checkpoint(source, average=average)
  architecture = architecture or _only_architecture(file.weights, source)
  imported = families.import_checkpoint(
    file.weights, architecture, num_classes=num_classes, layout=layout, arguments=arguments
  )
  usual = architectures.preprocessing_of(architecture)
  directory = _directory(source)
  preprocessing, said_by = stated_preprocessing(directory, usual) if directory else (usual, "")
  metadata = {
    **architectures.stored_description(architecture, imported.num_classes, imported.arguments),
    "num_classes": imported.num_classes,
    "preprocessing": dataclasses.asdict(preprocessing),
    # Files of weights do not say by which loss they came about.
    "task_settings": {},
    **origin(file, imported),
  }
  if said_by:
    metadata["source"]["preprocessing"] = said_by
  return imported, metadata


def origin(
  file: readers.CheckpointFile, imported: families.Imported | ImportedDense
) -> dict[str, Any]:
  """What metadata says of where weights are from."""
  return {
    # Not in such files; those of maps are "map_class_names".
    "class_names": [],
    "step": None,
    "results": {},
    "weights": "imported",
    "source": {
      "files": file.sha256,
      "kind": file.kind,
      "branch": file.branch,
      "layout": imported.layout,
      **file.origin,
    },
    "initialised_anew": imported.report.initialised,
  }


def _directory(source: str | Path | Fetched) -> Path | None:
  """The directory or repository that weights lie in; beside a file alone anything may lie."""
  if isinstance(source, Fetched):
    return source.path.parent
  path = Path(source).expanduser()
  return path if path.is_dir() else None


def _only_architecture(weights: Mapping[str, Any], source: str | Path | Fetched) -> str:
  found, family = families.identify(weights)
  if len(found) == 1:
    return found[0]
  place = source.path if isinstance(source, Fetched) else source
  if found:
    raise ValueError(
      f"{place} fits several networks, which prepare pictures differently: say --arch="
      f"{' or --arch='.join(found)}"
    )
  near = f"; its names are of {family}, in no registered size" if family else ""
  raise ValueError(f"{place} is of no registered architecture{near}")
