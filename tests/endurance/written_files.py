"""What commands of the package write, on inputs so small that each takes a second or two."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from hybrid_vit import exports, model_export
from hybrid_vit.data import manifest, tar_index
from hybrid_vit.embeddings import Embeddings
from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.recipes import TINY_MOAT
from hybrid_vit.tools import embed, export_weights, import_weights, prepare_data, push_to_hub
from hybrid_vit.weights import readers
from hybrid_vit.weights.stored import load_network
from tests import clips
from tests.data.pictures import as_tfrecord, write_folder
from tests.data.tar_files import pair, write_tar
from tests.endurance.damaged_files import examples, plain

_NETWORK = "tiny_moat_0"


@dataclasses.dataclass(frozen=True)
class Writer:
  """A command.

  Attributes:
    target: the name of what it writes.
    make: writes its inputs below a directory, which is there.
    write: (inputs, where to write, 0 for an earlier content or 1) writes it.
    read: what a later reader makes of what was written, comparable by ==; raises what that raises.
    only_new: whether it refuses to write where something is.
  """

  target: str
  make: Callable[[Path], Any]
  write: Callable[[Path, Path, int], Any]
  read: Callable[[Path], Any]
  only_new: bool = False


def _networks(given: Path) -> None:
  """Two exports of one network, and each as a file of its authors' names."""
  model = create_model(_NETWORK, 5, **TINY_MOAT)
  preprocessing = dataclasses.replace(model_entry(_NETWORK).preprocessing, image_size=64)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
  shapes = {"batch_stats": {}, **jax.eval_shape(model.init, jax.random.key(0), images)}
  for seed in range(2):
    rng = np.random.default_rng(seed)
    # Positive, as variances are.
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(x.dtype), shapes)  # noqa: B023
    metadata = {
      "name": _NETWORK,
      "arguments": dict(TINY_MOAT),
      "preprocessing": dataclasses.asdict(preprocessing),
      "task": "classification",
      "class_names": [f"class {i} of {seed}" for i in range(5)],
    }
    exports.export(given / f"export_{seed}", variables, metadata)
    export_weights.export_weights(given / f"export_{seed}", given / f"{seed}.safetensors")


def _import(given: Path, there: Path, which: int) -> None:
  import_weights.import_weights(
    given / f"{which}.safetensors", there / "weights", _NETWORK, arguments=dict(TINY_MOAT)
  )


def _read_program(there: Path) -> Any:
  """As somebody who has JAX alone: by what metadata.json says."""
  place = there / "program"
  metadata = json.loads((place / model_export.METADATA).read_text())
  program = jax.export.deserialize(bytearray((place / model_export.PROGRAM).read_bytes()))
  pictures = np.full((1, 64, 64, 3), 7, metadata["input"]["dtype"])
  return plain([metadata["class_names"], np.asarray(program.call(pictures))])


def _two_towers(given: Path) -> None:
  for seed in range(2):
    clips.write_small_clip(given / f"clip_{seed}", seed)
  write_folder(given / "photos", {"a": 2, "b": 1})


def _embed(given: Path, there: Path, which: int) -> None:
  arguments = [f"--weights={given / f'clip_{which}'}", str(given / "photos")]
  if embed.main([*arguments, f"--out={there / 'photos.npz'}"]):
    raise RuntimeError("it says why")


def _folder(given: Path) -> None:
  folder = write_folder(given / "folder", {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1})
  # One that was changed just now has no manifest that is kept.
  for path in (folder, *folder.glob("**/*")):
    os.utime(path, (1e9, 1e9))


def _tfrecord(given: Path) -> None:
  _folder(given)
  prepare_data.store_pictures(f"folder:{given / 'folder'}", given / "pets" / "1.0.0")
  as_tfrecord(given / "pets" / "1.0.0", given / "old", {"train": 2, "validation": 1})


def _read_prepared(there: Path) -> Any:
  return [
    examples("tfds:pets", split, data_dir=there / "data") for split in ("train", "validation")
  ]


def _listing(given: Path, there: Path, which: int) -> Any:
  """Reads a folder as though it were large, which leaves a manifest."""
  with (
    mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(there / "cache")}),
    mock.patch.object(manifest, "_MIN_PICTURES", 1),
  ):
    # As a process does that has not read it yet.
    manifest._known.clear()
    return manifest.read_listing(given / "folder")


def _read_listing(there: Path) -> Any:
  listing = _listing(there.parent / "given", there, 1)
  return plain([list(listing.directories), [os.fsdecode(n) for n in _all(listing.names)]])


def _all(names: Any) -> list[bytes]:
  return [bytes(names.buffer[a:b]) for a, b in zip([0, *names.ends[:-1]], names.ends)]


def _tar(given: Path) -> None:
  write_tar(given / "pairs.tar", {f"{i:03}": pair(i, clip_score=0.1 * i) for i in range(4)})
  # One that was changed just now has no index that is kept.
  os.utime(given / "pairs.tar", (1e9, 1e9))


def _index(given: Path, there: Path, which: int) -> tar_index.TarIndex:
  with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(there / "cache")}):
    return tar_index.read_index(given / "pairs.tar")


def _read_index(there: Path) -> Any:
  index = _index(there.parent / "given", there, 1)
  return plain([index.members(i) for i in range(len(index))])


WRITERS: Mapping[str, Writer] = {
  "import_weights": Writer(
    "weights", _networks, _import, lambda there: plain(exports.load_weights(there / "weights"))
  ),
  "export_weights": Writer(
    "out.safetensors",
    _networks,
    lambda given, there, which: export_weights.export_weights(
      given / f"export_{which}", there / "out.safetensors"
    ),
    lambda there: plain(dict(readers.read_checkpoint(there / "out.safetensors").weights)),
  ),
  "export_model": Writer(
    "program",
    _networks,
    lambda given, there, which: model_export.export_model(
      load_network(given / f"export_{which}"), there / "program", platforms=("cpu",)
    ),
    _read_program,
  ),
  "push_to_hub --dry_run": Writer(
    "folder",
    _networks,
    lambda given, there, which: push_to_hub.prepare(
      given / f"export_{which}", there / "folder", "owner/name", licence="mit"
    ),
    lambda there: plain(exports.load_weights(there / "folder")),
  ),
  "embed": Writer(
    "photos.npz",
    _two_towers,
    _embed,
    lambda there: plain(dataclasses.asdict(Embeddings.load(there / "photos.npz"))),
  ),
  "prepare_data, of pictures": Writer(
    "pets",
    _folder,
    lambda given, there, which: prepare_data.store_pictures(
      f"folder:{given / 'folder'}", there / "data" / "pets" / "1.0.0"
    ),
    _read_prepared,
    only_new=True,
  ),
  "prepare_data, of TFRecord": Writer(
    "pets",
    _tfrecord,
    lambda given, there, which: prepare_data.convert_tfrecord(
      given / "old", there / "data" / "pets" / "1.0.0"
    ),
    _read_prepared,
    only_new=True,
  ),
  "a large folder's manifest": Writer("cache", _folder, _listing, _read_listing, only_new=True),
  "a tar's index": Writer("cache", _tar, _index, _read_index, only_new=True),
}
