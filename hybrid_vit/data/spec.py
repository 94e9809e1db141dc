"""What a batch is made of: each key of an example, its kind, its type and its shape.

A task declares the fields of a training and of an evaluation example. A field's kind tells the
transforms how an operation on the picture's plane moves the key, and the loader how to make one row
of a batch of it. Dimensions that the transform decides stand as None until `resolve` has asked it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
  import jax

# How a key follows when the picture is resized, cropped, flipped or padded:
#   image    [H, W, C], resampled by the operation's filter
#   map      [H, W], whole numbers (classes), nearest; filled with the operation's `ignore`
#   depth    [H, W], float32 metres, nearest; filled with 0, "not measured"
#   boxes    [N, 4], float32 (x0, y0, x1, y1) in pixels, moved and cut at the border
#   points   [N, 2], float32 (x, y) in pixels, moved
#   masks    [N, H, W], uint8, nearest; filled with 0
#   text     a string, or the tokens made of it; stays
#   value    numbers of the example as a whole, such as its class; stays
#   host     anything else (a name, an original size); kept aside and never sent to devices
KINDS = ("image", "map", "depth", "boxes", "points", "masks", "text", "value", "host")

# Made by the loader for every batch: the position in the source, and for evaluation 1 for rows that
# count, 0 for padding. For training 1 where the drawn picture could not be read and another came.
INDEX, MASK, REPLACED = "index", "mask", "replaced"

# Two sizes of the noise on which a transform is tried.
_NOISE_SIZES = ((500, 640), (768, 576))


@dataclasses.dataclass(frozen=True)
class Field:
  """One key of an example.

  Attributes:
    kind: one of `KINDS`.
    dtype: NumPy's name of the type in the batch; None for what the transform gives.
    shape: of one example; a None is decided by the transform.
    ragged: the first dimension is the most there may be: fewer are padded with `pad`, of more the
      first ones are kept.
    pad: fills ragged rows, and the whole of a row that does not count.
    minimum: the smallest value allowed, e.g. 0 for a class; None for no limit.
    maximum: the largest value allowed; None for no limit.
    on_host: rows stay on the host as they are, each of its own shape, as with kind "host"; but
      transforms move the key by its kind.
    besides: one value allowed beside those of the range, e.g. 255 of a map for no class.
  """

  kind: str
  dtype: str | None = None
  shape: tuple[int | None, ...] = ()
  ragged: bool = False
  pad: float = 0
  minimum: float | None = None
  maximum: float | None = None
  on_host: bool = False
  besides: float | None = None

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(f"field kind {self.kind!r} is not one of {', '.join(KINDS)}")
    if self.ragged and not self.shape:
      raise ValueError("a ragged field needs a shape: its first dimension is the most there may be")

  @property
  def stays_on_host(self) -> bool:
    """Whether it is no array of a batch."""
    return self.on_host or self.kind == "host"

  @property
  def resolved(self) -> bool:
    """Whether type and shape are known."""
    return self.stays_on_host or (self.dtype is not None and None not in self.shape)


Fields = Mapping[str, Field]


class Spec(NamedTuple):
  """The fields that a task needs of an example: in training, and in evaluation."""

  train: Fields
  evaluation: Fields


def batch_shapes(
  fields: Fields, batch_size: int, *, train: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of a batch of resolved fields, those that the loader adds included."""
  import jax  # here alone: processes that read have no use for it

  shapes = {
    name: jax.ShapeDtypeStruct((batch_size, *map(int, field.shape)), np.dtype(field.dtype))  # type: ignore[arg-type]
    for name, field in on_device(fields).items()
  }
  shapes[INDEX] = jax.ShapeDtypeStruct((batch_size,), np.dtype(np.int32))
  shapes[REPLACED if train else MASK] = jax.ShapeDtypeStruct((batch_size,), np.dtype(np.float32))
  return shapes


def kinds(fields: Fields) -> dict[str, str]:
  """Kind of each key, for the transforms."""
  return {name: field.kind for name, field in fields.items()}


def on_device(fields: Fields) -> dict[str, Field]:
  """The fields that go into a batch's arrays."""
  return {name: field for name, field in fields.items() if not field.stays_on_host}


def resolve(
  fields: Fields,
  transform: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]],
  example: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, Field]:
  """Fields with every type and shape known.

  The transform is tried on noise of two sizes. Where it does not give both the same shape, or needs
  a real example, or there is a value of which the data alone knows the shape, `example` is asked
  for one.

  Args:
    fields: as a task declares them.
    transform: `(example, generator) → example`.
    example: gives a readable example of the data; None where no data is at hand.

  Raises:
    ValueError: a key is missing or its shape is not fixed, naming the key and what was found.
  """
  if all(field.resolved for field in fields.values()):
    return dict(fields)
  found, error = [], None
  try:
    for size in _NOISE_SIZES:
      found.append(transform(_noise(fields, size), np.random.default_rng(0)))
  except (ValueError, TypeError, KeyError) as caught:
    error = caught
  varying = [] if error else [n for n, f in fields.items() if not _same(f, n, *found)]
  missing = [name for name in varying if name not in found[0]]
  of_data = any(field.kind == "value" and not field.resolved for field in fields.values())
  if (error or varying or of_data) and example is not None:
    found, error = [transform(dict(example()), np.random.default_rng(0))], None
  elif error:
    raise error
  elif varying and not missing:
    shapes = [np.asarray(item[varying[0]]).shape for item in found]
    raise ValueError(
      f"the transform gives {varying[0]!r} of shape {list(shapes[0])} or {list(shapes[1])}, "
      "depending on the picture: end it with a resize or a crop to one size"
    )
  return {name: _filled(field, name, found[0]) for name, field in fields.items()}


def _same(field: Field, name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
  if field.resolved:
    return True
  if name not in first or name not in second:
    return False
  return field.ragged or np.asarray(first[name]).shape == np.asarray(second[name]).shape


def _filled(field: Field, name: str, example: Mapping[str, Any]) -> Field:
  if field.resolved:
    return field
  if name not in example:
    raise ValueError(
      f"the examples have no {name!r}, which the task needs; they have: "
      f"{', '.join(sorted(example))}"
    )
  value = np.asarray(example[name])
  shape = field.shape[:1] + value.shape[1:] if field.ragged else value.shape
  if len(shape) != len(field.shape) or any(
    want is not None and want != size for want, size in zip(field.shape, shape)
  ):
    raise ValueError(
      f"{name!r} has shape {list(value.shape)} behind the transform; {list(field.shape)} was "
      "expected (None: any size)"
    )
  return dataclasses.replace(field, dtype=field.dtype or value.dtype.name, shape=tuple(shape))


def _noise(fields: Fields, size: tuple[int, int]) -> dict[str, Any]:
  height, width = size
  made: dict[str, Any] = {}
  for name, field in fields.items():
    few = [1 if n is None else n for n in field.shape]
    if field.kind == "image":
      made[name] = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    elif field.kind == "map":
      made[name] = np.zeros((height, width), np.int32)
    elif field.kind == "depth":
      made[name] = np.ones((height, width), np.float32)
    elif field.kind == "boxes":
      made[name] = np.array([[0, 0, width, height]], np.float32)
    elif field.kind == "points":
      made[name] = np.array([[width / 2, height / 2]], np.float32)
    elif field.kind == "masks":
      made[name] = np.ones((1, height, width), np.uint8)
    elif field.kind == "text":
      made[name] = "a picture"
    elif field.kind == "value":
      made[name] = np.zeros(few[1:] if field.ragged else few, field.dtype or "int32")
      if field.ragged:
        made[name] = made[name][None]
  return made


def blank(field: Field) -> np.ndarray:
  """One row that does not count, of a resolved field."""
  return np.full([n or 0 for n in field.shape], field.pad, field.dtype)


def row(field: Field, name: str, value: Any) -> np.ndarray:
  """One row of a batch: the type and shape that the field declares, padded where it is ragged.

  Raises:
    ValueError: another shape, or a value out of range; the caller knows the example's name.
  """
  given = np.asarray(value)
  shape, dtype = tuple(n or 0 for n in field.shape), np.dtype(field.dtype)
  if field.ragged and not given.size:
    given = np.zeros((0, *shape[1:]), dtype)
  array = given = given[: shape[0]] if field.ragged and given.ndim else given
  for limit, beyond, word in (
    (field.minimum, np.less, "below the smallest"),
    (field.maximum, np.greater, "above the largest"),
  ):
    # Before the type changes, in which a number too large would become another one.
    if limit is None:
      continue
    far = beyond(given, limit)
    far = far if field.besides is None else far & (given != field.besides)
    if (wrong := given[far]).size:
      raise ValueError(f"{name!r} is {wrong.flat[0]}, {word} allowed, {limit:g}")
  if dtype.kind in "iu" and not _whole(given, dtype):
    raise ValueError(f"{name!r} is {_first(given)} of type {given.dtype}; {dtype} was expected")
  if field.ragged and given.shape[1:] == shape[1:] and len(given) < shape[0]:
    array = blank(field)
    array[: len(given)] = given
  if array.shape != shape:
    raise ValueError(f"{name!r} has shape {list(array.shape)}; {list(shape)} was expected")
  return array.astype(dtype, copy=False)


def _whole(given: np.ndarray, dtype: np.dtype[Any]) -> bool:
  """Whether the numbers stay what they are in a type of whole numbers."""
  if given.dtype == dtype or not given.size:
    return True
  with np.errstate(invalid="ignore"):
    return given.dtype.kind in "biuf" and bool((given.astype(dtype) == given).all())


def _first(given: np.ndarray) -> Any:
  return given.flat[0] if given.size == 1 else f"an array that begins with {given.flat[0]}"
