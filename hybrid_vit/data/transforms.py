"""Transforms: small registered operations on one example, written as one string.

    "decode|random_resized_crop(224)|flip_lr|randaugment(2, 9, magnitude_std=0.5)"

The same registry serves training and evaluation. Every operation takes the example (a dict) and a
NumPy Generator, and draws from that alone. Kinds say what the example's keys are (spec.KINDS): an
operation on the picture's plane draws once and moves each of them, one on colours changes pictures.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data import box_operations as _box_operations  # noqa: F401  (fills the registry)
from hybrid_vit.data import caption_operations as _captions  # noqa: F401  (the same)
from hybrid_vit.data import map_operations as _map_operations  # noqa: F401  (the same)
from hybrid_vit.data import operations as _operations  # noqa: F401  (as well)
from hybrid_vit.data import segment_operations as _segments  # noqa: F401  (and here)
from hybrid_vit.data import spec
from hybrid_vit.data.decoding import DECODERS, CorruptPictureError, decode_picture
from hybrid_vit.data.geometry import PLANE_KINDS, Plane, move, plane_size
from hybrid_vit.data.scaled_decoding import ScaledPicture
from hybrid_vit.data.transform_registry import (
  GIVEN,
  REGISTRY,
  Example,
  Later,
  OnImages,
  OnPlane,
  Transform,
  register_transform,
)  # fmt: skip

__all__ = [
  "DECODERS", "CorruptPictureError", "Example", "OnImages", "OnPlane", "Plane", "Transform",
  "decode_picture", "parse_transform", "register_transform", "transform_signatures",
]  # fmt: skip


def transform_signatures() -> dict[str, str]:
  """Every registered name with its arguments, for the documentation."""
  return {name: _signature(name) for name in sorted(REGISTRY)}


def parse_transform(
  text: str, decoder: str = "opencv", kinds: Mapping[str, str] | None = None
) -> Transform:
  """A string of operations → one function.

  Args:
    text: operations separated by "|"; arguments are Python literals.
    decoder: "opencv" or "pil": what reads encoded pictures (see `decode_picture`).
    kinds: kind of each key of the examples (see spec.KINDS); one picture, "image", by default.

  Raises:
    ValueError: an unknown operation, a bad argument or one that cannot move a key, naming the
      operation and what would be right.
  """
  if decoder not in DECODERS:
    raise ValueError(f"decoder {decoder!r} is not one of {', '.join(DECODERS)}")
  kinds = {"image": "image"} if kinds is None else dict(kinds)
  for name, kind in kinds.items():
    if kind not in spec.KINDS:
      raise ValueError(f"kind {kind!r} of {name!r} is not one of {', '.join(spec.KINDS)}")
  operations = [_parse_one(part.strip(), decoder, kinds) for part in _split(text)]
  for operation, after in zip(operations, [*operations[1:], None]):
    if isinstance(operation, Later) and not isinstance(after, OnPlane):
      raise ValueError(
        f"transform {text!r}: what decode(scaled=True) may leave out is told by the operation on "
        "the plane behind it, such as random_resized_crop, and none comes next"
      )
  steps: list[Transform] = []
  # Neighbours on the plane are drawn one after another and applied together.
  for is_plane, group in itertools.groupby(operations, lambda item: isinstance(item, OnPlane)):
    members = list(group)
    steps += [_plane_step(members, kinds)] if is_plane else [_step(o, kinds) for o in members]

  return ParsedTransform(text, decoder, kinds, steps)


class ParsedTransform:
  """What a string of operations does; another process gets the string and reads it anew.

  Args:
    text: as given to `parse_transform`.
    decoder: likewise.
    kinds: likewise.
    steps: what it made of them.
  """

  def __init__(self, text: str, decoder: str, kinds: dict[str, str], steps: Sequence[Transform]):
    self._given, self._steps = (text, decoder, kinds), steps

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    for step in self._steps:
      example = step(example, rng)
    return example

  def __reduce__(self) -> tuple[Any, ...]:
    return parse_transform, self._given


def _plane_step(operations: Sequence[OnPlane], kinds: Mapping[str, str]) -> Transform:
  def transform(example: Example, rng: np.random.Generator) -> Example:
    size = plane_size(example, kinds)
    planes: list[Plane] = []
    for operation in operations:
      drawn = operation.draw(*size, rng)
      planes += [drawn] if isinstance(drawn, Plane) else drawn
      size = planes[-1].size if planes else size
    moved = move(example, planes, kinds)
    for name, kind in kinds.items():
      if kind == "image" and isinstance(value := moved.get(name), ScaledPicture):
        moved[name] = value.decoded()
    return moved

  return transform


def _step(operation: OnImages | Later | Transform, kinds: Mapping[str, str]) -> Transform:
  if isinstance(operation, Later):
    return operation.apply
  if not isinstance(operation, OnImages):
    return operation
  names = [name for name, kind in kinds.items() if kind == "image"]

  def transform(example: Example, rng: np.random.Generator) -> Example:
    present = [name for name in names if name in example]
    plane_size(example, dict.fromkeys(names, "image"))
    state = rng.bit_generator.state if len(present) > 1 else None
    changed = dict(example)
    for number, name in enumerate(present):
      if number:
        rng.bit_generator.state = state  # type: ignore[assignment]
      changed[name] = operation.apply(example[name], rng)
    return changed

  return transform


def _split(text: str) -> list[str]:
  parts = text.split("|")
  if not all(part.strip() for part in parts):
    raise ValueError(f"transform {text!r} has an empty operation between its bars")
  return parts


def _parse_one(text: str, decoder: str, kinds: Mapping[str, str]) -> Any:
  try:
    node = ast.parse(text, mode="eval").body
  except (SyntaxError, ValueError) as error:
    raise ValueError(f"transform {text!r} cannot be read: name(arguments) was expected") from error
  call = node if isinstance(node, ast.Call) else None
  head = call.func if call is not None else node
  if not isinstance(head, ast.Name):
    raise ValueError(f"transform {text!r} cannot be read: name(arguments) was expected")
  if head.id not in REGISTRY:
    near = difflib.get_close_matches(head.id, list(REGISTRY), n=1, cutoff=0.4)
    hint = f"did you mean {_signature(near[0])}?" if near else f"there are: {', '.join(REGISTRY)}"
    raise ValueError(f"unknown transform {head.id!r}; {hint}")
  factory = REGISTRY[head.id]
  try:
    arguments = [_literal(argument) for argument in (call.args if call else [])]
    keywords = {_known(k.arg, factory): _literal(k.value) for k in (call.keywords if call else [])}
    for name, value in zip(GIVEN, (decoder, kinds)):
      if name in inspect.signature(factory).parameters:
        keywords[name] = value
    operation = factory(*arguments, **keywords)
  except (TypeError, ValueError) as error:
    message = str(error).replace(f"{getattr(factory, '__name__', '')}()", "it")
    raise ValueError(f"transform {text!r}: {message}; it is {_signature(head.id)}") from error
  left = [f"{n!r} ({k})" for n, k in kinds.items() if k in PLANE_KINDS and k != "image"]
  if isinstance(operation, OnImages) and operation.moves and left:
    raise ValueError(
      f"transform {text!r} turns and shifts the picture, and {', '.join(left)} cannot follow: "
      f"leave {head.id} out; color_jitter and three_augment change colours alone"
    )
  return operation


def _literal(node: ast.expr) -> Any:
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(
      f"{ast.unparse(node)} is not a number, a string or a tuple of these, which was expected"
    ) from error


def _known(keyword: str | None, factory: Callable[..., Any]) -> str:
  names = [name for name in inspect.signature(factory).parameters if name not in GIVEN]
  if keyword not in names:
    near = difflib.get_close_matches(str(keyword), names, n=1)
    raise ValueError(
      f"there is no argument {keyword!r}" + (f", did you mean {near[0]!r}?" if near else "")
    )
  return str(keyword)


def _signature(name: str) -> str:
  signature = inspect.signature(REGISTRY[name])
  parameters = [
    p.replace(annotation=inspect.Parameter.empty)
    for p in signature.parameters.values()
    if p.name not in GIVEN
  ]
  text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
  return name + text
