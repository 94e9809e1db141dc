"""Files of maps and depth → arrays, and what is refused of them, with the remedy."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from hybrid_vit.data.errors import CorruptExampleError

# What every map holds where no class is: `spec.KINDS` and the borders of crops have it, too.
IGNORE = 255


def read_labels(encoded: bytes, name: str) -> np.ndarray:
  """The numbers in a map's file, int32 `[H, W]`.

  Of a palette picture these are the indices, whatever their colours.

  Args:
    encoded: PNG or what else PIL reads without loss; one channel.
    name: of the file, for the message.

  Raises:
    CorruptExampleError: no picture, or one of colours.
  """
  picture = _open(encoded, name)
  if picture.mode not in ("P", "L", "1", "I") and not picture.mode.startswith("I;16"):
    raise CorruptExampleError(
      f"{name} is a picture of colours ({picture.mode}); a map of one channel that holds the "
      "numbers of the classes was expected. Write the numbers themselves, or a palette picture "
      "(PIL's mode P), in which colours stand for numbers"
    )
  if picture.format == "JPEG":
    raise CorruptExampleError(
      f"{name} is a JPEG, which changes numbers at every edge: write the maps as PNG"
    )
  return np.asarray(picture).astype(np.int32)


def read_segments(encoded: bytes, name: str) -> np.ndarray:
  """COCO's panoptic ids, R + 256 G + 65536 B, int32 `[H, W]`; 0 is unlabelled.

  Raises:
    CorruptExampleError: no picture, or one without three channels.
  """
  picture = _open(encoded, name)
  if picture.mode not in ("RGB", "RGBA"):
    raise CorruptExampleError(
      f"{name} has mode {picture.mode}; a panoptic PNG, whose colours RGB are the ids of segments, "
      "was expected. For a map of classes take the source maps:/path"
    )
  channels = np.asarray(picture).astype(np.int32)
  return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]


def read_depth(encoded: bytes, name: str, scale: float, cap: float | None = None) -> np.ndarray:
  """Metres, float32 `[H, W]`; 0 where nothing was measured.

  Args:
    encoded: a PNG of 16 bits, or an array of NumPy's (.npy), `[H, W]` or `[H, W, 1]`.
    name: of the file; its ending says which.
    scale: how many units of the file are one metre: 1000 for millimetres.
    cap: metres; what is farther is not measured.

  Raises:
    CorruptExampleError: not such a file, a negative depth, or not one pixel measured.
  """
  if name.lower().endswith(".npy"):
    values = _array(encoded, name)
  else:
    picture = _open(encoded, name)
    if not picture.mode.startswith("I"):
      raise CorruptExampleError(
        f"{name} has mode {picture.mode}, 8 bits a value; a PNG of 16 bits in one channel, or "
        ".npy, was expected: a picture painted of the depth does not hold it"
      )
    values = np.asarray(picture)
  return as_depth(values, name, scale, cap)


def as_depth(values: np.ndarray, name: str, scale: float, cap: float | None = None) -> np.ndarray:
  """The same of numbers, `[H, W]` or `[H, W, 1]`; see `read_depth`."""
  if values.ndim == 3 and values.shape[2] == 1:
    values = values[..., 0]
  if values.ndim != 2:
    raise CorruptExampleError(f"{name} has shape {list(values.shape)}; [H, W] was expected")
  depth = values.astype(np.float32) / np.float32(scale)
  depth = np.where(np.isfinite(depth), depth, np.float32(0))
  if depth.min(initial=0) < 0:
    raise CorruptExampleError(
      f"{name}: depth {depth.min():g} m; numbers of at least 0 were expected, 0 for 'not measured'"
    )
  if cap is not None:
    depth = np.where(depth > cap, np.float32(0), depth)
  if not depth.any():
    within = "" if cap is None else f" up to the cap of {cap:g} m"
    raise CorruptExampleError(
      f"{name}: no pixel is measured{within}, all are 0. Take the pair out, or look whether it was "
      "written in other units"
    )
  return depth


def check_size(values: np.ndarray, photo: bytes, name: str, photo_name: str) -> None:
  """Raises CorruptExampleError where a map is not of its photo's size (from the header alone)."""
  height, width = picture_size(photo, photo_name)
  if values.shape != (height, width):
    raise CorruptExampleError(
      f"{name} is {values.shape[0]} x {values.shape[1]} and its photo {photo_name} {height} x "
      f"{width} (height x width): resize the map to the photo by the nearest pixel, or look "
      "whether the two belong together"
    )


def picture_size(encoded: bytes, name: str) -> tuple[int, int]:
  """(height, width) from a photo's header; CorruptExampleError where it is no picture."""
  width, height = _open(encoded, name, load=False).size
  return height, width


def check_labels(labels: np.ndarray, most: int, ignore: int, name: str, told_by: str = "") -> None:
  """Raises CorruptExampleError for a label that is neither 0 to `most` nor `ignore`.

  Args:
    labels: whole numbers.
    most: the last class.
    ignore: stands for no class.
    name: of the file, for the message.
    told_by: the file that names the classes, where there is one.
  """
  wrong = labels[((labels < 0) | (labels > most)) & (labels != ignore)]
  if wrong.size:
    found = ", ".join(map(str, np.unique(wrong)[:5]))
    raise CorruptExampleError(
      f"{name} holds label {found}; 0 to {most}, or {ignore} for no class, were expected"
      f"{f', since {told_by} names {most + 1} classes' if told_by else ''}: say how "
      "many classes there are (classes=…), which number stands for none (ignore=…), or that 0 is "
      "none and the classes begin at 1 (reduce_zero_label=true)"
    )


def _open(encoded: bytes, name: str, load: bool = True) -> Image.Image:
  try:
    picture = Image.open(io.BytesIO(encoded))
    if load:
      picture.load()
  except Exception as error:  # PIL's plugins raise whatever their formats bring up.
    raise CorruptExampleError(f"{name}: {error or type(error).__name__}") from error
  return picture


def _array(encoded: bytes, name: str) -> np.ndarray:
  try:
    values = np.load(io.BytesIO(encoded), allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    raise CorruptExampleError(f"{name} is no array of NumPy's: {error}") from error
  if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
    raise CorruptExampleError(f"{name} holds no numbers; one array of depths was expected")
  return values
