"""The table of named models: what each is made of, what its weights expect, what was published."""

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

# The modules that register models when imported, in the order in which they are listed.
_FAMILIES = (
  "hybrid_vit.models.moat",
  "hybrid_vit.models.cvt",
  "hybrid_vit.models.focalnet",
  "hybrid_vit.models.smt",
  "hybrid_vit.models.l2vit",
  "hybrid_vit.models.revcol",
  "hybrid_vit.models.mci",
  "hybrid_vit.models.vit",
  "hybrid_vit.models.swin",
  "hybrid_vit.models.convnext",
  "hybrid_vit.models.resnet",
  "hybrid_vit.models.pvt",
  "hybrid_vit.models.cswin",
)

_ENTRIES: dict[str, "ModelEntry"] = {}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a model's weights expect of a picture.

  Attributes:
    image_size: side of the square input in pixels.
    crop_ratio: side of the centre crop over the short side that the picture is resized to.
    interpolation: "bilinear" or "bicubic".
    mean: of each channel, in [0, 1] units.
    std: of each channel, in [0, 1] units.
    resize: "crop" (short side to image_size / crop_ratio, then a centre crop) or "squash"
      (straight to image_size x image_size).
  """

  image_size: int
  crop_ratio: float
  interpolation: str
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  resize: str = "crop"


def as_preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
  """From a mapping, as metadata has it."""
  mean, std = tuple(fields["mean"]), tuple(fields["std"])
  return Preprocessing(**{**fields, "mean": mean, "std": std})


def imagenet_preprocessing(image_size: int) -> Preprocessing:
  """The usual one: bicubic, ImageNet's statistics, a crop of 0.875; above 224 the whole picture."""
  whole = image_size > 224
  return Preprocessing(
    image_size=image_size,
    crop_ratio=1.0 if whole else 0.875,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="squash" if whole else "crop",
  )


@dataclasses.dataclass(frozen=True)
class Published:
  """The authors' figures, at the entry's own input size and number of classes.

  Attributes:
    parameters: trainable parameters, exact where the authors' code gives the exact count.
    multiply_adds: of one forward pass of one picture.
    top1: ImageNet-1K validation accuracy in percent.
    source: where the figures come from.
  """

  parameters: float | None
  multiply_adds: float | None
  top1: float | None
  source: str


class FeatureSpec(NamedTuple):
  """One level of the feature pyramid: an endpoint's name, its stride and its channels."""

  name: str
  stride: int
  channels: int


def feature_pyramid(
  widths: Sequence[int], steps: Sequence[int], first: int = 1
) -> tuple[FeatureSpec, ...]:
  """Levels "stage1" … of channels `widths`; a stage's stride is `first` times the steps so far."""
  strides = itertools.accumulate(steps, operator.mul, initial=first)
  next(strides)
  return tuple(
    FeatureSpec(f"stage{i}", stride, width)
    for i, (stride, width) in enumerate(zip(strides, widths), start=1)
  )


def output_pyramid(
  pyramid: Sequence[FeatureSpec], output_norms: Sequence[int]
) -> tuple[FeatureSpec, ...]:
  """Of a pyramid of stages the levels that have norms beside the trunk, "stage1_norm" …

  Args:
    pyramid: one level for each stage.
    output_norms: the stages, counted from 1, in any order; with none `pyramid` stays as it is.
  """
  if not output_norms:
    return tuple(pyramid)
  return tuple(
    level._replace(name=f"{level.name}_norm")
    for stage, level in enumerate(pyramid, start=1)
    if stage in output_norms
  )


@dataclasses.dataclass(frozen=True)
class ModelEntry:
  """A named model: `module_class(**arguments)`, with what belongs to it."""

  name: str
  module_class: type[nn.Module]
  arguments: Mapping[str, Any]
  preprocessing: Preprocessing
  published: Published


def register(
  name: str,
  module_class: type[nn.Module],
  arguments: Mapping[str, Any],
  *,
  preprocessing: Preprocessing,
  published: Published,
) -> None:
  """Adds a model to the table.

  Raises:
    ValueError: for a name that is taken, or arguments that the class does not have.
  """
  if name in _ENTRIES:
    raise ValueError(f"a model named {name!r} is already registered")
  _check_arguments(name, module_class, arguments)
  _ENTRIES[name] = ModelEntry(name, module_class, dict(arguments), preprocessing, published)


def list_models(pattern: str = "*") -> list[str]:
  """Names of the registered models that match a shell pattern such as "tiny_moat*"."""
  return [name for name in _entries() if fnmatch.fnmatchcase(name, pattern)]


def model_entry(name: str) -> ModelEntry:
  """The entry of a model.

  Raises:
    ValueError: for an unknown name; the message gives the closest.
  """
  entries = _entries()
  if name not in entries:
    raise ValueError(
      f"no model is named {name!r}{closest_hint(name, entries)}; list_models() gives all "
      f"{len(entries)} names"
    )
  return entries[name]


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> nn.Module:
  """Builds a model by name.

  Args:
    name: as `list_models` gives it.
    num_classes: width of the head; 0 for no head; None for the entry's own.
    **overrides: attributes of the module that replace the entry's. Lists become tuples, and a
      dtype may be given by name.

  Raises:
    ValueError: for an unknown name or attribute; the message gives the closest.
  """
  entry = model_entry(name)
  _check_arguments(name, entry.module_class, overrides)
  arguments = {**entry.arguments, **{k: _as_attribute(k, v) for k, v in overrides.items()}}
  if num_classes is not None:
    arguments["num_classes"] = num_classes
  return entry.module_class(**arguments)


def model_arguments(name: str) -> tuple[str, ...]:
  """Names of the attributes that `create_model(name, ...)` takes.

  Raises:
    ValueError: for an unknown name; the message gives the closest.
  """
  return _arguments(model_entry(name).module_class)


def _arguments(module_class: type[nn.Module]) -> tuple[str, ...]:
  fields = dataclasses.fields(module_class)
  return tuple(f.name for f in fields if f.name not in ("parent", "name"))


def _entries() -> dict[str, ModelEntry]:
  for module in _FAMILIES:
    importlib.import_module(module)
  return {name: _ENTRIES[name] for name in _by_family(tuple(_ENTRIES))}


@functools.lru_cache(maxsize=1)
def _by_family(names: tuple[str, ...]) -> tuple[str, ...]:
  """A module that somebody imported by itself has registered its models before the others."""
  order = {module: i for i, module in enumerate(_FAMILIES)}
  place = {name: order.get(_ENTRIES[name].module_class.__module__, len(order)) for name in names}
  return tuple(sorted(names, key=place.__getitem__))


def _check_arguments(name, module_class, arguments) -> None:
  known = _arguments(module_class)
  for argument in arguments:
    if argument not in known:
      raise ValueError(
        f"{name} ({module_class.__name__}) has no argument {argument!r}"
        f"{closest_hint(argument, known)}; it has: {', '.join(known)}"
      )


def closest_hint(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
  """ "; did you mean …?" with the name that is spelt most like it, or nothing."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def _as_attribute(name: str, value: Any) -> Any:
  if name == "dtype" and isinstance(value, str):
    return jnp.dtype(value)
  if isinstance(value, (list, tuple)):
    return tuple(_as_attribute(name, v) for v in value)
  return value
