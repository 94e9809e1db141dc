"""ImageNet's other evaluation sets, by name: their pictures, classes and rules.

    imagenet_v2:/path       ImageNet-V2 (arXiv:1902.10811): folders "0" … "999"
    imagenet_real:/path?labels=/real.json   ReaL (arXiv:2006.07159): the validation pictures, each
    with
                            a set of classes; right is a prediction in the set, and pictures whose
                            set is empty are left out
    imagenet_a:/path        ImageNet-A (arXiv:1907.07174) and -R (arXiv:2006.16241): 200 classes
    each; imagenet_r:/path        only their logits compete imagenet_sketch:/path   ImageNet-Sketch
    (arXiv:1905.13549) imagenet_c:/path/gaussian_noise/3       one corruption and severity of
    ImageNet-C (arXiv:1903.12261)

Folders of classes are called by their WordNet numbers, plain numbers from 0, or words; what they
lie in does not matter. Labels are those of the 1,000 classes. A zip serves as well as a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data.archives import ZipReader
from hybrid_vit.data.classes import matching_classes, wordnet_numbers
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.folders import FolderReader, Reader
from hybrid_vit.data.listing import Listing
from hybrid_vit.data.splits import part_slice, spread_order

VARIANTS = (
  "imagenet_v2",
  "imagenet_real",
  "imagenet_a",
  "imagenet_r",
  "imagenet_sketch",
  "imagenet_c",
)
# Their figures are over their own classes.
_SUBSETS = ("imagenet_a", "imagenet_r")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.I)

SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's top-1 error, the mean over the severities, by which ImageNet-C's authors divide
# (github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
  "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
  "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
  "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
  "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
  "jpeg_compression": 0.606500,
}  # fmt: skip


class VariantSource:
  """Pictures of one of the sets; see the head of this file and `sources.Source`.

  Attributes:
    info: "class_names" (WordNet numbers of the 1,000), "class_subset" (the classes that compete,
      where they are fewer) and "label_sets" (the right classes of each picture, where there may be
      several).
    labels: int32 `[N]`; of several right classes the first.
  """

  def __init__(
    self,
    reader: Reader,
    listing: Listing,
    chosen: np.ndarray,
    labels: np.ndarray,
    info: Mapping[str, Any],
  ):
    self._reader, self._listing, self._chosen = reader, listing, chosen
    self.labels, self.info = labels, dict(info)

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self._listing.path(int(self._chosen[index]))
    return {"image": self._reader.read(path), "label": int(self.labels[index])}

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return self._reader.full_name(self._listing.path(int(self._chosen[index])))


def open_variant(kind: str, path: str, part: str = ":") -> VariantSource:
  """Opens one of `VARIANTS`.

  Args:
    kind: its name.
    path: what follows the colon, local.
    part: a slice, "[:500]" without the brackets; every class in proportion.

  Raises:
    MissingDataError: nothing there, or no labels.
    ValueError: a folder that is no class of ImageNet's, or labels of another number of pictures.
  """
  place, _, options = path.partition("?")
  root = Path(place)
  reader: Reader = ZipReader(root) if root.suffix.lower() == ".zip" else FolderReader(root)
  listing = reader.listing()
  if not len(listing):
    raise MissingDataError(f"{kind}: {root} holds no picture")
  info: dict[str, Any] = {"class_names": wordnet_numbers()}
  if kind == "imagenet_real":
    chosen, sets = _real(reader, listing, options)
    labels = np.array([group[0] for group in sets], np.int32)
  else:
    if options:
      raise ValueError(f"{kind}:{path}: `?` names labels, which only imagenet_real has")
    chosen, labels, sets = np.arange(len(listing)), _labels(kind, reader, listing), None
  if kind in _SUBSETS:
    info["class_subset"] = tuple(int(label) for label in np.unique(labels))
  order = spread_order(labels)[part_slice(part, len(labels))] if part != ":" else slice(None)
  kept = np.sort(np.arange(len(labels))[order])
  if not len(kept):
    raise ValueError(f"{kind}:{path}: the part [{part}] is empty")
  if sets is not None:
    info["label_sets"] = tuple(sets[i] for i in kept)
  return VariantSource(reader, listing, chosen[kept], labels[kept], info)


def _labels(kind: str, reader: Reader, listing: Listing) -> np.ndarray:
  """The class of each picture, by the name of its directory."""
  holding = np.array([listing.directory(i) for i in range(len(listing))])
  numbers = {}
  for directory in np.unique(holding):
    name = listing.directories[directory].rpartition("/")[2]
    number = int(matching_classes(wordnet_numbers(), [name])[0])
    if number < 0 and name.isascii() and name.isdecimal():
      number = int(name)
    if not 0 <= number < len(wordnet_numbers()):
      example = reader.full_name(listing.path(int(np.flatnonzero(holding == directory)[0])))
      raise ValueError(
        f"{kind}: {example} lies in {name!r}, which is no class of ImageNet-1K: a folder by its "
        "WordNet number (n01440764) or a number below 1,000 was expected"
      )
    numbers[directory] = number
  return np.array([numbers[d] for d in holding], np.int32)


def _real(
  reader: Reader, listing: Listing, options: str
) -> tuple[np.ndarray, list[tuple[int, ...]]]:
  """Numbers of the pictures that count, and the classes of each."""
  name, _, place = options.partition("=")
  if name != "labels" or not place:
    raise MissingDataError(
      "imagenet_real needs its labels, real.json of google-research/reassessed-imagenet: "
      f"imagenet_real:{reader.root}?labels=/path/real.json"
    )
  try:
    all_sets = json.loads(Path(place).expanduser().read_text())
  except (OSError, ValueError) as error:
    raise MissingDataError(f"imagenet_real: {place} cannot be read: {error}") from error
  if not isinstance(all_sets, list) or not all(isinstance(group, list) for group in all_sets):
    raise ValueError(f"imagenet_real: {place} is no list of lists of classes")
  chosen, sets = [], []
  for i in range(len(listing)):
    path = listing.path(i)
    match = _VALIDATION.search(path)
    if not match or not 1 <= int(match[1]) <= len(all_sets):
      raise ValueError(
        f"imagenet_real: {reader.full_name(path)} is none of the {len(all_sets):,} validation "
        "pictures, ILSVRC2012_val_00000001.JPEG and on: their names say which labels are theirs"
      )
    if group := all_sets[int(match[1]) - 1]:
      chosen.append(i)
      sets.append(tuple(map(int, group)))
  if not chosen:
    raise MissingDataError(f"imagenet_real: none of the pictures in {reader.root} has a label")
  return np.array(chosen), sets


def corruption_sets(root: str | Path) -> dict[str, str]:
  """Name → source of each corruption and severity that ImageNet-C's folder has: "snow/3".

  The corruptions may lie in folders of their kinds ("noise/gaussian_noise/3").

  Raises:
    MissingDataError: none of the 15 is there.
  """
  top = Path(root)
  found: dict[str, str] = {}
  for corruption in ALEXNET_ERRORS:
    places = [top / corruption, *sorted(top.glob(f"*/{corruption}"))]
    for place in places:
      for severity in SEVERITIES:
        if (place / str(severity)).is_dir():
          found.setdefault(f"{corruption}/{severity}", f"imagenet_c:{place / str(severity)}")
  if not found:
    raise MissingDataError(
      f"ImageNet-C was looked for in {top}: <corruption>/<severity>/<class>/*, e.g. "
      f"snow/3/n01440764"
    )
  return found


def corruption_errors(top1: Mapping[str, float]) -> dict[str, float]:
  """Mean errors of ImageNet-C from the top-1 accuracies of `corruption_sets`.

  Args:
    top1: "snow/3" → accuracy in [0, 1].

  Returns:
    For each corruption with all severities "error/<corruption>", their mean, and "ce/<corruption>",
    divided by AlexNet's; where all 15 are there also "mean_error" and "mce", the means over them.
  """
  found: dict[str, float] = {}
  for corruption, alexnet in ALEXNET_ERRORS.items():
    names = [f"{corruption}/{severity}" for severity in SEVERITIES]
    if all(name in top1 for name in names):
      error = float(np.mean([1.0 - top1[name] for name in names]))
      found |= {f"error/{corruption}": error, f"ce/{corruption}": error / alexnet}
  for name, kind in (("mean_error", "error"), ("mce", "ce")):
    each = [value for key, value in found.items() if key.startswith(f"{kind}/")]
    if len(each) == len(ALEXNET_ERRORS):
      found[name] = float(np.mean(each))
  return found


def padded_sets(sets: Sequence[Sequence[int]]) -> np.ndarray:
  """Sets of classes as one array, int32 `[N, M]`, filled up with -1."""
  table = np.full((len(sets), max(map(len, sets))), -1, np.int32)
  for i, group in enumerate(sets):
    table[i, : len(group)] = group
  return table
