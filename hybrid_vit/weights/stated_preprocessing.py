"""What files beside weights of timm and transformers say of how pictures are to be prepared.

Weights under one name differ in it: ViTs by the mean, ConvNeXts by the crop. Another preparation
than that of the training gives figures that are wrong without a word.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_vit.models.registry import Preprocessing

TIMM, TRANSFORMERS = "config.json", "preprocessor_config.json"
# timm's names of how a picture becomes a square.
_RESIZES = {"center": "crop", "squash": "squash"}


def stated_preprocessing(folder: Path, usual: Preprocessing) -> tuple[Preprocessing, str]:
  """The preparation that the files in a folder of weights ask for.

  Args:
    folder: of a model, with its weights.
    usual: of the network; what no file speaks of is taken from it.

  Returns:
    (it, the name of the file that says so); (`usual`, "") where none does. Of transformers' files
    mean and standard deviation alone are read.

  Raises:
    ValueError: a file asks for what no `Preprocessing` is.
  """
  timm = _read(folder / TIMM).get("pretrained_cfg")
  if isinstance(timm, Mapping):
    return _by_timm(timm, usual, folder / TIMM), TIMM
  said = _read(folder / TRANSFORMERS)
  if said.get("do_normalize", True) and {"image_mean", "image_std"} <= set(said):
    mean, std = (_channels(said[key], folder / TRANSFORMERS) for key in ("image_mean", "image_std"))
    return dataclasses.replace(usual, mean=mean, std=std), TRANSFORMERS
  return usual, ""


def described_difference(usual: Preprocessing, stated: Preprocessing) -> str:
  """ "crop_ratio 0.95 (0.875 usually)" and so on; "" where they are the same."""
  pairs = zip(dataclasses.asdict(usual).items(), dataclasses.asdict(stated).values())
  return ", ".join(f"{name} {new} ({old} usually)" for (name, old), new in pairs if old != new)


def _by_timm(said: Mapping[str, Any], usual: Preprocessing, path: Path) -> Preprocessing:
  size = list(said.get("input_size") or (3, usual.image_size, usual.image_size))
  mode = said.get("crop_mode") or "center"
  interpolation = said.get("interpolation") or usual.interpolation
  if (
    len(size) != 3
    or size[0] != 3
    or size[1] != size[2]
    or mode not in _RESIZES
    or interpolation not in ("bilinear", "bicubic")
  ):
    raise ValueError(
      f"{path} asks for pictures of {size}, crop_mode {mode!r}, {interpolation!r}; squares of "
      f"three channels, {' or '.join(map(repr, _RESIZES))}, 'bilinear' or 'bicubic' was expected"
    )
  return Preprocessing(
    image_size=int(size[1]),
    crop_ratio=float(said.get("crop_pct") or usual.crop_ratio),
    interpolation=interpolation,
    mean=_channels(said["mean"], path) if said.get("mean") else usual.mean,
    std=_channels(said["std"], path) if said.get("std") else usual.std,
    resize=_RESIZES[mode],
  )


def _channels(values: Any, path: Path) -> tuple[float, float, float]:
  if not isinstance(values, list) or len(values) != 3:
    raise ValueError(f"{path} gives {values!r} where a number for each of three channels belongs")
  return float(values[0]), float(values[1]), float(values[2])


def _read(path: Path) -> Mapping[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}") from error
  return found if isinstance(found, Mapping) else {}
