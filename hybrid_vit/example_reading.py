"""Transform strings of a configuration → what makes rows of examples, and the rows' shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybrid_vit.config import ConfigError
from hybrid_vit.data.spec import Field, kinds, resolve
from hybrid_vit.data.transforms import Transform, parse_transform
from hybrid_vit.models.registry import Preprocessing

# "{image_size}", "{interpolation!r}"; not the braces of a dict.
_FILLED_IN = re.compile(r"\{\w*(?:![rs])?(?::[^{}'\"]*)?\}")
CANVAS = "{canvas}"


@dataclasses.dataclass(frozen=True)
class Reading:
  """How the examples of a phase or of an evaluation set become rows.

  Attributes:
    transform: `(example, generator) → example`.
    fields: with their shapes.
    others: how those of the second canvas and of further ones do (`config.data.canvases`).
  """

  transform: Transform
  fields: Mapping[str, Field]
  others: tuple[Reading, ...] = ()


def fill_transform(text: str, preprocessing: Preprocessing) -> str:
  """`{image_size}`, `{interpolation!r}` and so on in a transform string → the values.

  Raises:
    ConfigError: a name that is no field of `Preprocessing`.
  """
  fields = dataclasses.asdict(preprocessing)
  try:
    return _FILLED_IN.sub(lambda match: match[0].format(**fields), text)
  except (KeyError, IndexError, ValueError) as error:
    raise ConfigError(
      f"transform {text!r} names {error} in braces; there are: {', '.join(fields)}"
    ) from error


def fill_canvases(
  text: str, preprocessing: Preprocessing, canvases: Sequence[Sequence[int]]
) -> tuple[str, ...]:
  """As `fill_transform`, for each of `config.data.canvases`, which stands for {canvas}.

  Raises:
    ConfigError: canvases and no {canvas}, or the other way round.
  """
  if (CANVAS in text) != bool(canvases):
    raise ConfigError(
      f"config.data.canvases is {canvases} and the transform {text!r}: {CANVAS} in the transform, "
      "and canvases that stand for it, were expected together"
    )
  return tuple(
    fill_transform(text.replace(CANVAS, str(tuple(canvas))), preprocessing)
    for canvas in canvases or ((),)
  )


def read_transform(
  text: str,
  decoder: str,
  fields: Mapping[str, Field],
  example: Callable[[], Mapping[str, Any]] | None,
) -> Reading:
  """A transform string → the function, and the fields as it leaves them."""
  apply = parse_transform(text, decoder, kinds(fields))
  return Reading(apply, resolve(fields, apply, example))
