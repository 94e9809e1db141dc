"""What a network looked at in photos: Grad-CAM, attention, modulators, components of features.

python -m hybrid_vit.tools.visualize --weights=DIR photo.jpg another.png
python -m hybrid_vit.tools.visualize --weights=DIR --class="tabby" --methods=grad_cam photo.jpg
python -m hybrid_vit.tools.visualize --weights=DIR --zero_shot="a cat,a dog" photo.jpg

DIR is what hybrid_vit.tools.predict takes, and photos are prepared as there. Each photo gets a
folder of its own in --out: sheet.png with all maps, photo.png as the network saw it, and a PNG for
each method. Without --methods there are all that the network has: grad_cam (a classifier, or an
image tower with --zero_shot), attention and rollout (softmax attention over the whole map),
modulators (FocalNet), pca (any). Weights of segmentation, depth and detection are seen by their
backbone. A photo that cannot be read is named and skipped, and the command then returns 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hybrid_vit import checkpoints, recipes
from hybrid_vit.class_prediction import Texts, class_index, embedded_texts
from hybrid_vit.heat_map_plots import enlarged, overlay_heat, plot_heat_maps
from hybrid_vit.heat_maps import METHODS, OF_ENDPOINTS, HeatMap, HeatMapper
from hybrid_vit.photos import read_photos, unused_names
from hybrid_vit.plots import printable
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.stored_models import StoredModel, described, image_network, load_model
from hybrid_vit.weights.stored import class_names
from hybrid_vit.weights.stored_clip import StoredClip

_SHEET, _PHOTO = "sheet.png", "photo.png"


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, 2 where photos were skipped, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="visualize", description=__doc__.splitlines()[0])
  parser.add_argument("photos", nargs="+", help="files of pictures")
  parser.add_argument("--weights", required=True, help="directory of the weights")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--methods", help=f"of {', '.join(METHODS)}; default: all there are")
  parser.add_argument(
    "--class", dest="target", help="of Grad-CAM, name or number; default: likeliest"
  )
  parser.add_argument("--endpoint", help=f"the layer of {' and '.join(OF_ENDPOINTS)}")
  parser.add_argument("--zero_shot", help='texts instead of classes, e.g. "a cat,a dog"')
  parser.add_argument(
    "--out", default="heat_maps", help="directory to write (default: %(default)s)"
  )
  parser.add_argument("--overwrite", action="store_true", help="write over files that are there")
  args = parser.parse_args(argv)
  try:
    stored = load_model(args.weights, args.arch)
    mapper = HeatMapper(image_network(stored))
    texts = _texts(args.zero_shot, stored)
    methods = _methods(args, mapper, texts)
    target = _target(args, mapper, methods, texts)
    images, skipped = read_photos(args.photos, mapper.network.preprocessing)
    folders = _folders(args, list(images), methods)
    heats = {
      method: mapper.maps(
        method,
        list(images.values()),
        target=target,
        endpoint=args.endpoint if method in OF_ENDPOINTS else None,
        texts=texts,
      )
      for method in methods
    }
  except (ValueError, ImportError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  expected = mapper.network.preprocessing
  print(f"{described(stored)}, weights from {args.weights}")
  print(
    f"pictures prepared by {recipes.eval_transform(expected)}, mean {expected.mean}, std "
    f"{expected.std}: {mapper.network.preprocessing_said_by}"
  )
  for i, (photo, image) in enumerate(images.items()):
    own = [heats[method][i] for method in methods]
    print(printable(photo))
    for heat in own:
      shape = " x ".join(map(str, heat.values.shape[:2]))
      print(f"  {printable(heat.title)}: {heat.source}, {shape}")
    try:
      written = _write(folders[i], photo, image, own)
    except OSError as error:
      print(f"error: {folders[i]} cannot be written: {error}", file=sys.stderr)
      return 1
    for path in written:
      print(f"written: {path}")
  for photo, reason in skipped.items():
    print(f"skipped {printable(photo)}: {printable(reason)}", file=sys.stderr)
  return 2 if skipped else 0


def _texts(zero_shot: str | None, stored: StoredModel) -> Texts | None:
  """The texts that were given, with their embeddings.

  Raises:
    ValueError: no text, or weights without a text tower.
  """
  if zero_shot is None:
    return None
  if not isinstance(stored, StoredClip):
    raise ValueError(f"--zero_shot: these weights ({described(stored)}) have no text tower")
  return embedded_texts(stored, zero_shot)


def _methods(args: argparse.Namespace, mapper: HeatMapper, texts: Texts | None) -> tuple[str, ...]:
  if args.methods is not None:
    methods = tuple(dict.fromkeys(m.strip() for m in args.methods.split(",") if m.strip()))
    for method in methods:
      mapper.check(method, texts)
    if not methods:
      raise ValueError(f"--methods names none; there are: {', '.join(mapper.methods)}")
    return methods
  with_texts = texts is not None and "grad_cam" not in mapper.methods
  return ("grad_cam", *mapper.methods) if with_texts else mapper.methods


def _target(
  args: argparse.Namespace, mapper: HeatMapper, methods: Sequence[str], texts: Texts | None
) -> int | None:
  """The class that was asked for.

  Raises:
    ValueError: there is no such class, or nothing that would be of it.
  """
  if args.endpoint is not None and not set(OF_ENDPOINTS) & set(methods):
    raise ValueError(f"--endpoint is of {' and '.join(OF_ENDPOINTS)}, and neither is made")
  if args.target is None:
    return None
  if "grad_cam" not in methods:
    raise ValueError("--class is of grad_cam, and none is made")
  names = class_names(mapper.network) if texts is None else texts.names
  return class_index(args.target, names)


def _folders(
  args: argparse.Namespace, photos: Sequence[Path], methods: Sequence[str]
) -> list[Path]:
  """Where each photo's maps go.

  Raises:
    FileExistsError: something is there already.
  """
  folders = [Path(args.out).expanduser() / name for name in unused_names(photos, "")]
  files = [f / name for f in folders for name in (_SHEET, _PHOTO, *(f"{m}.png" for m in methods))]
  there = [str(path) for path in files if path.exists()]
  if there and not args.overwrite:
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    raise FileExistsError(
      f"{there[0]}{more} would be written over: give --overwrite, or another --out"
    )
  return folders


def _write(folder: Path, photo: Path, image: np.ndarray, heats: Sequence[HeatMap]) -> list[Path]:
  folder.mkdir(parents=True, exist_ok=True)
  plot_heat_maps(image, heats, photo.name, folder / _SHEET)
  pictures = {_PHOTO: enlarged(image)}
  pictures |= {f"{heat.method}.png": overlay_heat(image, heat) for heat in heats}
  for name, picture in pictures.items():
    Image.fromarray(picture).save(folder / name)
  return [folder / name for name in (_SHEET, *pictures)]


if __name__ == "__main__":
  run_tool(main)
