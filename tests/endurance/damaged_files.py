"""Every kind of file that the package reads, small and whole, with the way in which it is read."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hybrid_vit import exports
from hybrid_vit.config import load_config, load_sweep
from hybrid_vit.data.imagenet_variants import open_variant
from hybrid_vit.data.loader import Reading, eval_batches
from hybrid_vit.data.prompts import read_names
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.embeddings import Embeddings
from hybrid_vit.reporting import Reporter, read_metrics
from hybrid_vit.tools import prepare_data
from hybrid_vit.weights import readers
from tests import saved_states
from tests.data import test_coco_instances, test_maps, test_sources
from tests.data.pictures import as_tfrecord, encoded, photo, write_folder
from tests.data.tar_files import pair, write_tar
from tests.weights.test_torch_file import FILES


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file.

  Attributes:
    make: writes some below a directory, which is there.
    read: what the package makes of them, comparable by ==; raises what the package raises.
    damaged: which of the files are damaged, as a pattern.
    checked: whether the format has sums by which every change of what is read is noticed.
    lines: whether a last line that does not end may go, as a kill leaves one.
    named: by what a message may name a file; YOLO's texts by their photos.
  """

  make: Callable[[Path], Any]
  read: Callable[[Path], Any]
  damaged: str = "**/*"
  checked: bool = False
  lines: bool = False
  named: Callable[[Path], str] = lambda path: path.name


def plain(value: Any) -> Any:
  """Anything that is read as what can be compared: arrays by type, shape and bytes."""
  if hasattr(value, "rle"):  # masks that are made when they are asked for
    value = [value.part(row, 0, 0, *value.shape[1:]) for row in range(len(value))]
  if isinstance(value, np.ndarray):
    return str(value.dtype), value.shape, value.tobytes()
  if isinstance(value, Mapping):
    return tuple((str(key), plain(value[key])) for key in sorted(value, key=str))
  if isinstance(value, list | tuple):
    return tuple(map(plain, value))
  return value


def examples(
  spec: str,
  split: str = "train",
  host: Sequence[str] = ("label",),
  data_dir: Path | None = None,
  decode: str = "decode|",
) -> Any:
  """What an evaluation reads of a source: every picture at 8 px, and other fields as they are."""
  source = create_source(spec, split, None if data_dir is None else str(data_dir))
  return _batches(source, host, decode)


def _batches(source: Any, host: Sequence[str], decode: str = "decode|") -> Any:
  fields = {"image": Field("image", "uint8", (8, 8, 3)), **{name: Field("host") for name in host}}
  reading = Reading(4, parse_transform(f"{decode}resize(8)"), fields)
  return plain([dict(source.info), list(eval_batches(source, reading, num_threads=1))])


def _pictures(formats: Sequence[str], place: Path) -> None:
  for i in range(3):
    path = place / "train" / f"class_{i % 2}" / f"{i}.{formats[i].lower()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(i), formats[i]))


def _folder(place: Path) -> Any:
  return examples(f"folder:{place}", "all")


def _zip(method: int, place: Path) -> None:
  folder = write_folder(place / "folder", {"train/a": 2, "train/b": 2})
  with zipfile.ZipFile(place / "pictures.zip", "w", method) as file:
    for path in sorted(folder.rglob("*.jpg")):
      file.write(path, path.relative_to(folder).as_posix())
  shutil.rmtree(folder)


def _tars(place: Path) -> None:
  write_tar(place / "pairs.tar", {f"{i:03}": pair(i, clip_score=0.1 * i) for i in range(4)})


def _array_record(place: Path) -> None:
  folder = write_folder(place / "folder", {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1})
  prepare_data.store_pictures(f"folder:{folder}", place / "pets" / "1.0.0")
  shutil.rmtree(folder)


def _tfrecord(place: Path) -> None:
  _array_record(place)
  as_tfrecord(place / "pets" / "1.0.0", place / "old" / "1.0.0", {"train": 2, "validation": 1})
  shutil.rmtree(place / "pets")


def _coco(place: Path) -> None:
  images = [test_coco_instances.image(number) for number in (1, 2)]
  things = [test_coco_instances.thing(n, 1 + n % 2, category=(18, 1)[n % 2]) for n in range(4)]
  test_coco_instances.write(place, images, things)


_OBJECTS = ("boxes", "box_labels", "areas", "crowd", "masks", "image_id")


def _yolo(place: Path) -> None:
  for i in range(2):
    for path, content in (
      (place / "images" / f"{i}.jpg", encoded(photo(i))),
      (place / "labels" / f"{i}.txt", f"0 0.5 0.5 0.{i + 2} 0.25\n1 0.2 0.2 0.1 0.1\n".encode()),
      (place / "data.yaml", b"names:\n  0: cat\n  1: dog\n"),
    ):  # fmt: skip
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)


def _maps(place: Path) -> None:
  rng = np.random.default_rng(0)
  for i in range(2):
    for path, content in (
      (f"images/{i}.jpg", encoded(photo(i))),
      (f"annotations/{i}.png", encoded(rng.integers(0, 3, (40, 60), np.uint8), "PNG")),
      ("classes.txt", "sky\nroad\nça va\n".encode()),
    ):
      (place / path).parent.mkdir(exist_ok=True)
      (place / path).write_bytes(content)


def _depth(place: Path) -> None:
  depth = np.random.default_rng(0).integers(500, 5000, (40, 60))
  for name in ("images", "depth"):
    (place / name).mkdir()
  for i in range(2):
    (place / "images" / f"{i}.jpg").write_bytes(encoded(photo(i)))
  Image.fromarray(depth.astype(np.uint16)).save(place / "depth" / "0.png")
  np.save(place / "depth" / "1.npy", depth.astype(np.float32) / 1000)
  (place / "list.txt").write_text("images/0.jpg depth/0.png\nimages/1.jpg depth/1.npy 518.9\n")


def _captions(ending: str, place: Path) -> None:
  for i in range(3):
    (place / f"{i}.jpg").write_bytes(encoded(photo(i)))
  if ending == "csv":
    text = "image,caption,clip_score\n" + "".join(f"{i}.jpg,picture {i},0.{i}\n" for i in range(3))
  else:
    text = "".join(
      json.dumps({"image": f"{i}.jpg", "caption": f"picture {i}", "clip_score": i}) + "\n"
      for i in range(3)
    )
  (place / f"table.{ending}").write_text(text)


def _real(place: Path) -> None:
  for i in range(1, 3):
    (place / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(encoded(photo(i)))
  (place / "real.json").write_text(json.dumps([[1, 2], [3]]))


def _read_real(place: Path) -> Any:
  source = open_variant("imagenet_real", f"{place}?labels={place / 'real.json'}", ":")
  return _batches(source, ("labels",))


def _states(place: Path) -> None:
  saved_states.save(place / "run", 1, 2, keep=3)


def _restored(place: Path) -> Any:
  found = saved_states.restore(place / "run")
  assert found is not None
  weights, metadata = exports.load_weights(place / "run")
  leaves = [np.asarray(x) for x in _leaves(found.state.replace(rng=None))]
  return plain([leaves, found.step, found.sums, found.info, found.run_config, weights, metadata])


def _leaves(tree: Any) -> list[Any]:
  import jax

  return jax.tree.leaves(tree)


def _export(place: Path) -> None:
  exports.export(place / "export", saved_states.weights(0), {"name": "conv", "class_names": ["é"]})


def _arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {f"layer{i}.weight": rng.normal(size=(4, 5)).astype(np.float32) for i in range(3)}


def _safetensors(place: Path) -> None:
  readers.write_safetensors(place / "model.safetensors", _arrays(), {"by": "us"})


def _parts(place: Path) -> None:
  weights = _arrays()
  for i, (name, value) in enumerate(weights.items()):
    readers.write_safetensors(place / f"part-{i}.safetensors", {name: value}, {})
  index = {"weight_map": {name: f"part-{i}.safetensors" for i, name in enumerate(weights)}}
  (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _checkpoint(name: str, place: Path) -> Any:
  found = readers.read_checkpoint(place / name)
  return plain([dict(found.weights), found.kind, found.branch])


def _torch(name: str, place: Path) -> None:
  shutil.copy(FILES / name, place / name)


_CONFIG = '''"""A recipe."""

from ml_collections import ConfigDict


def get_config(argument="tiny"):
  """What is trained."""
  return ConfigDict(dict(seed=0, model=dict(name=argument), data=dict(batch_size=64)))


def sweep():
  """Two rates."""
  return [{"seed": 1}, {"data.batch_size": 32}]
'''


def _read_config(place: Path) -> Any:
  config = load_config(place / "recipe.py")
  entries = load_sweep(place / "recipe.py")
  return plain([config.to_dict(), [(fields, one.to_dict()) for fields, one in entries]])


def _metrics(place: Path) -> None:
  reporter = Reporter(place, 4, run_config={"seed": 0}, sinks=("csv",), progress=False)
  for step in range(1, 5):
    reporter.scalars(step, {"loss": 1 / step}, kind="train")
  reporter.close()


def _read_metrics(place: Path) -> Any:
  """Read for a report, and then gone on with."""
  lines = read_metrics(place / "metrics.jsonl")
  Reporter(place, 6, 4, run_config={"seed": 0}, sinks=("csv",), progress=False).close()
  return plain([lines, [(place / f"metrics.{ending}").read_bytes() for ending in ("jsonl", "csv")]])


def _embeddings(place: Path) -> None:
  vectors = np.eye(3, dtype=np.float32)
  Embeddings(vectors, ("a.jpg", "b.jpg", "c.jpg"), "/photos", "/weights", "1").save(
    place / "photos.npz"
  )


def _read_embeddings(place: Path) -> Any:
  return plain(dataclasses.asdict(Embeddings.load(place / "photos.npz")))


def _npz(place: Path) -> None:
  np.savez(place / "weights.npz", **_arrays())


def _names(place: Path) -> None:
  (place / "classes.txt").write_text("cat\ndog\nça va\n", encoding="utf-8")


KINDS: Mapping[str, Kind] = {
  "folder of JPEG": Kind(functools.partial(_pictures, ("JPEG",) * 3), _folder),
  "folder of PNG": Kind(functools.partial(_pictures, ("PNG",) * 3), _folder),
  "folder of WebP": Kind(functools.partial(_pictures, ("WebP",) * 3), _folder),
  "folder of TIFF, GIF, BMP": Kind(functools.partial(_pictures, ("TIFF", "GIF", "BMP")), _folder),
  "zip, stored": Kind(
    functools.partial(_zip, zipfile.ZIP_STORED),
    lambda place: examples(f"zip:{place / 'pictures.zip'}", "all"),
  ),
  "zip, deflated": Kind(
    functools.partial(_zip, zipfile.ZIP_DEFLATED),
    lambda place: examples(f"zip:{place / 'pictures.zip'}", "all"),
  ),
  "tar of pairs": Kind(
    _tars, lambda place: examples(f"tar:{place / 'pairs.tar'}", host=("captions", "clip_score"))
  ),
  "TFDS, ArrayRecord": Kind(
    _array_record,
    lambda place: [
      examples(f"tfds:{place / 'pets' / '1.0.0'}", split) for split in ("train", "validation")
    ],
  ),
  "TFDS, TFRecord": Kind(
    _tfrecord,
    lambda place: [
      examples(f"tfds:{place / 'old' / '1.0.0'}", split) for split in ("train", "validation")
    ],
  ),
  "Fashion-MNIST": Kind(
    lambda place: test_sources.write_fashion_mnist(place / "f"),
    lambda place: [
      examples(f"fashion_mnist:{place / 'f'}", split, decode="") for split in ("train", "test")
    ],
  ),
  "COCO objects": Kind(
    _coco, lambda place: examples(f"coco:{place}", "all", host=_OBJECTS), damaged="**/*.json"
  ),
  "COCO panoptic": Kind(
    lambda place: test_maps.panoptic(place),
    lambda place: examples(f"coco_panoptic:{place}", "all", host=("map", *_OBJECTS)),
    damaged="annotations/**/*",
  ),
  "YOLO": Kind(
    _yolo, lambda place: examples(f"yolo:{place}", "all", host=_OBJECTS), damaged="labels/*",
    named=lambda path: f"images/{path.stem}.jpg",
  ),
  "YOLO's names": Kind(
    _yolo, lambda place: examples(f"yolo:{place}", "all", host=_OBJECTS), damaged="*.yaml"
  ),
  "maps as PNG": Kind(
    _maps, lambda place: examples(f"maps:{place}", "all", host=("map",)), damaged="annotations/*"
  ),
  "classes.txt of maps": Kind(
    _maps, lambda place: examples(f"maps:{place}", "all", host=("map",)), damaged="classes.txt"
  ),
  "depth as PNG and npy": Kind(
    _depth,
    lambda place: examples(f"depth:{place}", "all", host=("depth",)),
    damaged="depth/*",
  ),
  "list of depth pairs": Kind(
    _depth,
    lambda place: examples(f"depth:{place}?list={place / 'list.txt'}", "all", host=("depth",)),
    damaged="list.txt",
  ),
  "captions, CSV": Kind(
    functools.partial(_captions, "csv"),
    lambda place: examples(f"captions:{place / 'table.csv'}", host=("captions", "clip_score")),
    damaged="table.*",
  ),
  "captions, JSONL": Kind(
    functools.partial(_captions, "jsonl"),
    lambda place: examples(f"captions:{place / 'table.jsonl'}", host=("captions", "clip_score")),
    damaged="table.*",
  ),
  "labels of ImageNet-ReaL": Kind(_real, _read_real, damaged="real.json"),
  "checkpoint": Kind(_states, _restored, damaged="run/checkpoints/2/**/*", checked=True),
  "export": Kind(
    _export, lambda place: plain(exports.load_weights(place / "export")), checked=True
  ),
  "safetensors": Kind(_safetensors, functools.partial(_checkpoint, "model.safetensors")),
  "safetensors in parts": Kind(_parts, functools.partial(_checkpoint, "")),
  "PyTorch, zip": Kind(
    functools.partial(_torch, "new.pth"), functools.partial(_checkpoint, "new.pth")
  ),
  "PyTorch, before 2020": Kind(
    functools.partial(_torch, "old.pth"), functools.partial(_checkpoint, "old.pth")
  ),
  "NumPy's npz": Kind(_npz, functools.partial(_checkpoint, "weights.npz")),
  "configuration": Kind(
    lambda place: (place / "recipe.py").write_text(_CONFIG), _read_config, damaged="recipe.py"
  ),
  "metrics": Kind(_metrics, _read_metrics, damaged="metrics.*", lines=True),
  "embeddings": Kind(_embeddings, _read_embeddings),
  "names of classes": Kind(_names, lambda place: read_names(str(place / "classes.txt"))),
}  # fmt: skip
