"""Checkpoints of a backbone with its decoder or detector: read strictly, and written back.

Layouts are those of the key maps of decoders and detectors; which one a checkpoint has is told by
its names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hybrid_vit.heads.dense_detection import DenseDetector
from hybrid_vit.heads.dense_model import DenseModel
from hybrid_vit.heads.dino import DINO
from hybrid_vit.heads.kmax import KMaX
from hybrid_vit.heads.mask2former import Mask2Former
from hybrid_vit.heads.rcnn import RCNN
from hybrid_vit.models.initialization import initial_variables, variable_shapes
from hybrid_vit.weights import convert, families
from hybrid_vit.weights.convert import ImportReport, Layout, OfficialKey
from hybrid_vit.weights.keymap_detectors import detector_layouts
from hybrid_vit.weights.keymap_dino import dino_layouts
from hybrid_vit.weights.keymap_heads import dense_layouts
from hybrid_vit.weights.keymap_kmax import kmax_layouts
from hybrid_vit.weights.keymap_mask2former import mask2former_layouts
from hybrid_vit.weights.transfer import begins_anew, is_head

Weights = Mapping[str, np.ndarray]

# By the class of a whole model: `(model, layouts of its backbone) → layouts of its checkpoints`.
_LAYOUTS: Mapping[type, Callable[[Any, Mapping[str, Layout]], dict[str, Layout]]] = {
  DenseModel: lambda model, backbone: _decoder_layouts(model, backbone),
  RCNN: detector_layouts,
  DenseDetector: detector_layouts,
  DINO: dino_layouts,
}
WHOLE_MODELS = tuple(_LAYOUTS)
# Side of a picture of which every network has cells enough; the names do not depend on it.
_ANY_SIZE = 256


@dataclasses.dataclass(frozen=True)
class ImportedDense:
  """A checkpoint's numbers in a backbone with its decoder.

  Attributes:
    variables: {"params", "batch_stats"}, NumPy arrays.
    layout: by which the checkpoint was read.
    report: what became of each tensor.
  """

  variables: dict[str, Any]
  layout: str
  report: ImportReport


def layouts_of(model: Any, network: str) -> dict[str, Layout]:
  """Layouts of checkpoints of a whole model.

  Args:
    model: the model.
    network: its backbone's name in the registry.

  Raises:
    ValueError: none is known of this backbone with this decoder.
  """
  layouts = next((own for kind, own in _LAYOUTS.items() if isinstance(model, kind)), None)
  found = layouts(model, families.layouts(network)) if layouts is not None else {}
  if not found:
    parts = [getattr(model, name, None) for name in ("neck", "head", "auxiliary_head")]
    decoder = " and ".join(type(part).__name__ for part in parts if part is not None)
    if not isinstance(model, DenseModel):
      decoder = type(model).__name__ + (f" with {decoder}" if decoder else "")
    raise ValueError(f"no names of checkpoints are known of {network} under {decoder}")
  return found


def find_layout(weights: Weights, model: Any, network: str, layout: str | None = None) -> str:
  """The layout with the most names in common with a checkpoint, or the one asked for.

  Args:
    weights: name to array.
    model: any number of classes will do.
    network: its backbone's name in the registry.
    layout: the only one to try, or None.

  Raises:
    ValueError: an unknown layout, or a checkpoint that has no name of the decoder or none of the
      backbone.
  """
  known = layouts_of(model, network)
  if layout is not None and layout not in known:
    raise ValueError(f"{_title(model, network)} has no layout {layout!r}; it has: {_list(known)}")
  paths = traverse_util.flatten_dict(_shapes(model, _ANY_SIZE), sep="/")
  counts = {}
  for name in [layout] if layout is not None else list(known):
    names, key_map = set(_named(weights, known[name])), known[name].key_map(model)
    common = {path for path in paths if names.issuperset(key_map(path).names)}
    decoder = sum("/backbone/" not in path for path in common)
    counts[name] = (len(common), decoder, len(common) - decoder)
  best = max(counts, key=lambda name: counts[name])
  _, decoder, backbone = counts[best]
  if not decoder or not backbone:
    lacking = "a decoder" if backbone else "a backbone" if decoder else "either part"
    raise ValueError(
      f"none of the checkpoint's names is one of {lacking} of {_title(model, network)} (layouts: "
      f"{_list(known)}); it has, e.g., {', '.join(list(weights)[:3])}"
      + (": without --config it is read as a network alone" if backbone else "")
    )
  return best


def classes_in(weights: Weights, model: Any, network: str, layout: str) -> int | None:
  """How many classes a checkpoint's classifier has; None where it has none by that layout."""
  chosen = layouts_of(model, network)[layout]
  named, key_map = _named(weights, chosen), chosen.key_map(model)
  for path in traverse_util.flatten_dict(_shapes(model, _ANY_SIZE), sep="/"):
    if is_head(path, dense=True) and re.search(r"classifier\d*/bias$", path):
      bias = named.get(key_map(path).name)
      if bias is not None and bias.ndim == 1:
        return _number_of_classes(model, len(bias))
  return None


def import_dense(
  weights: Weights,
  model: Any,
  network: str,
  layout: str,
  *,
  image_size: int,
  new_classifiers: bool = False,
) -> ImportedDense:
  """Puts a checkpoint's tensors into a model, each name used exactly once.

  Args:
    weights: name to array, as `readers.read_checkpoint` gives them.
    model: as large as the checkpoint.
    network: its backbone's name in the registry.
    layout: see `find_layout`.
    image_size: side of a picture that the model takes.
    new_classifiers: whether the layers that go by the classes begin anew.

  Raises:
    ValueError: the checkpoint does not fit; the message gives the differences and the lengths of
      the three lists.
  """
  chosen = layouts_of(model, network)[layout]
  named, constants = _named(weights, chosen), chosen.constants(model)
  named = {
    name: value
    for name, value in named.items()
    if name not in constants or not np.array_equal(value, constants[name])
  }
  template = _shapes(model, image_size)
  pattern = r"(?!)"
  if new_classifiers:
    flat, key_map = traverse_util.flatten_dict(template, sep="/"), chosen.key_map(model)
    anew = [
      path
      for path in flat
      if is_head(path, dense=True)
      and begins_anew(path, _shape_in(named, key_map(path)), flat[path])
    ]
    template = _with_new_classifiers(flat, anew, model, image_size)
    pattern = "|".join(f"^{re.escape(path)}$" for path in anew) or pattern
    keys = [key_map(path) for path in anew]
    names = {name for key in keys for name in (*key.names, *key.aliases)}
    named = {name: value for name, value in named.items() if name not in names}
  try:
    variables, report = convert.import_weights(
      named, template, chosen.key_map(model), may_initialise=pattern
    )
  except ValueError as error:
    raise ValueError(f"{_title(model, network)}, layout {layout!r}: {error}") from error
  variables.setdefault("batch_stats", {})
  return ImportedDense(variables, layout, report)


def has_decoder(weights: Weights, model: Any, network: str) -> bool:
  """Whether a checkpoint is of such a backbone with such a decoder, by its names."""
  try:
    find_layout(weights, model, network)
  except ValueError:
    return False
  return True


def import_as_large(
  weights: Weights, model: Any, network: str, *, image_size: int
) -> tuple[ImportedDense, int | None]:
  """As `import_dense`, for as many classes as the checkpoint has, by the layout of its names.

  Returns:
    (the numbers, how many classes; None of depth).

  Raises:
    ValueError: see `find_layout` and `import_dense`.
  """
  layout = find_layout(weights, model, network)
  classes = classes_in(weights, model, network, layout)
  if classes is not None:
    model = _with_classes(model, classes)
  return import_dense(weights, model, network, layout, image_size=image_size), classes


def export_dense(
  variables: Mapping[str, Any], model: Any, network: str, layout: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
  """The authors' names and layouts, with what their strict loaders ask for beside the weights.

  Args:
    variables: {"params", "batch_stats"} of `model`.
    model: the model.
    network: its backbone's name in the registry.
    layout: one of `layouts_of`; None for the first.

  Returns:
    (name to array, the layout).

  Raises:
    ValueError: an unknown layout, or one that has no name for a variable.
  """
  known = layouts_of(model, network)
  layout = layout or next(iter(known))
  if layout not in known:
    raise ValueError(f"{_title(model, network)} has no layout {layout!r}; it has: {_list(known)}")
  collections = {c: variables.get(c) or {} for c in ("params", "batch_stats")}
  exported = convert.export_weights(collections, known[layout].key_map(model))
  return {**families.with_counters(exported), **known[layout].constants(model)}, layout


def _decoder_layouts(model: Any, backbone: Mapping[str, Layout]) -> dict[str, Layout]:
  if isinstance(model.head, Mask2Former):
    return mask2former_layouts(model.backbone, backbone)
  if isinstance(model.head, KMaX):
    return kmax_layouts(model.backbone, backbone)
  return dense_layouts(model, backbone)


def _title(model: Any, network: str) -> str:
  return f"{network} under {type(model.head if isinstance(model, DenseModel) else model).__name__}"


def _number_of_classes(model: Any, width: int) -> int:
  """Of a classifier so wide."""
  if isinstance(model, RCNN) or isinstance(model.head, Mask2Former | KMaX):
    return width - 1  # the background, or no object
  return width // model.head.num_anchors if isinstance(model, DenseDetector) else width


def _with_classes(model: Any, classes: int) -> Any:
  """The same model for another number of classes."""
  if isinstance(model, RCNN):
    stages, masks = (
      tuple(head.clone(num_classes=classes) for head in heads)
      for heads in (model.stages, model.mask_heads)
    )
    return model.clone(stages=stages, mask_heads=masks)
  if isinstance(model, DenseDetector):
    return model.clone(head=model.head.clone(num_classes=classes))
  beside = getattr(model, "auxiliary_head", None)
  more = {} if beside is None else {"auxiliary_head": beside.clone(num_outputs=classes)}
  return model.clone(head=model.head.clone(num_outputs=classes), **more)


def _list(layouts: Mapping[str, Layout]) -> str:
  return ", ".join(layouts)


def _named(weights: Weights, layout: Layout) -> dict[str, np.ndarray]:
  """The tensors that are weights, under the names that the key map knows."""
  renamed = {layout.rename(name): value for name, value in weights.items()}
  return {k: v for k, v in renamed.items() if not re.search(layout.not_weights, k)}


def _shapes(model: Any, size: int) -> dict[str, Any]:
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return variable_shapes(model, images)


def _shape_in(named: Weights, key: OfficialKey) -> tuple[int, ...] | None:
  """Shape that our leaf takes from a checkpoint; None where it has none, or of another rank."""
  try:
    return key.read(named).shape
  except (KeyError, ValueError, IndexError):
    return None


def _with_new_classifiers(
  flat: Mapping[str, Any], anew: Sequence[str], model: Any, size: int
) -> dict[str, Any]:
  """The template with newly drawn numbers for these paths."""

  @jax.jit
  def draw(key: jax.Array) -> dict[str, jax.Array]:
    # Whatever the classifiers do not need is not computed.
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found = traverse_util.flatten_dict(initial_variables(model, key, images), sep="/")
    return {path: found[path] for path in anew}

  drawn = jax.device_get(draw(jax.random.key(0)))
  return traverse_util.unflatten_dict({**flat, **drawn}, sep="/")
