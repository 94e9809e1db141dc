"""Starting from other weights: what is taken over, what begins anew, what is left."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from hybrid_vit.models.layers import resize_relative_table
from hybrid_vit.models.positions import resize_sequence, resize_square_grid
from hybrid_vit.models.swin import resize_bicubic_table
from hybrid_vit.models.vitdet import RELATIVE_TABLES
from hybrid_vit.weights.dense_forms import fit_dense_form

# By a leaf's name, how its table of positions is resized: those `[heads, H, W]` of relative ones to
# (H, W), those `[N, C]` of grids and sequences to N.
_OF_PAIRS = {"position_table": resize_relative_table, "position_bias": resize_bicubic_table}
_OF_CELLS = {
  "position_embedding": resize_square_grid,
  "position_sequence": resize_sequence,
  **dict.fromkeys(RELATIVE_TABLES, resize_sequence),
}
# The classifier, and the ones that supervise a network from within or learn from a teacher.
_HEAD = r"[^/]+/(?:auxiliary_|distillation_)?head\d*/"
# Of a backbone with a decoder or detector only the last layers go by the classes.
_CLASSIFIER = (
  r"[^/]+/(?:(?:auxiliary_)?head/(?:(?:stage\d+|(?:decoder/(?:layer\d+/)?)?predictor|"
  r"semantic_decoder)/)?(?:auxiliary_|encoder_)?classifier\d*/|head/label_embedding\b|"
  r"box_head\d+/(?:classifier|deltas)/|mask_head\d+/classifier/)"
)
# Boxes of each class, or of all of them alike, whose width alone tells.
_CLASS_BOXES = re.compile(r"[^/]+/box_head\d+/deltas/")
_BACKBONE = re.compile(r"([^/]+)/backbone/")


@dataclasses.dataclass(frozen=True)
class TransferReport:
  """Names of leaves, "params/stage1_block0/…".

  Attributes:
    loaded: taken over, some of them resized (said in brackets).
    initialised: begun anew, with the reason.
    unused: in the source, without a place here.
  """

  loaded: tuple[str, ...]
  initialised: tuple[str, ...]
  unused: tuple[str, ...]

  def __str__(self) -> str:
    def lines(title: str, names: tuple[str, ...], shown: int) -> list[str]:
      rest = [f"    … and {len(names) - shown} more"] if len(names) > shown else []
      return [f"  {title}: {len(names)}", *(f"    {name}" for name in names[:shown]), *rest]

    resized = tuple(name for name in self.loaded if name.endswith(")"))
    return "\n".join(
      [
        f"  loaded: {len(self.loaded)}, of which resized: {len(resized)}",
        *(f"    {name}" for name in resized),
        *lines("initialised anew", self.initialised, 20),
        *lines("unused", self.unused, 20),
      ]
    )


# Why a leaf of two towers begins anew where the source is one network: text, image.
_ALONE = ("no text tower in the source", "a projection in the place of a head")


def transfer(
  source: Mapping[str, Any], target: Mapping[str, Any], *, reinitialize_head: bool = False
) -> tuple[dict[str, Any], TransferReport]:
  """Puts the weights of `source` into the places of `target`.

  Where `source` has an image and a text tower and `target` is one network, it takes the first.
  Where `target` has both and `source` is one network, that is the image tower: its head, which
  projects here, and all of the text tower begin anew. Where `target` is a backbone with a decoder
  and `source` is one network, that is the backbone: the decoder, and layer norms that stand beside
  the trunk, begin anew; the other way round the decoder is left.

  Args:
    source: {"params", "batch_stats"}, arrays.
    target: newly initialised variables of the network that is to be trained.
    reinitialize_head: whether the head keeps its new values, whatever width the source's has. Else
      it is taken over, and another width is an error.

  Returns:
    Variables like `target`, as NumPy arrays of its types but for what begins anew, which is
    `target`'s own, and the report. Tables of positions are resized, kernels and levels fitted to
    the dense form of the network (see `dense_forms`).

  Raises:
    ValueError: a shape that differs elsewhere than in a table of positions or a kernel that grows
      in a dense form, a head of another width that was not announced, or leaves outside the head
      that `source` lacks, but for norms of the outputs.
  """
  unused_text: tuple[str, ...] = ()
  if is_clip(source) and not is_clip(target):
    whole = source["params"]
    text = {"params": {name: whole[name] for name in whole if name != "image"}}
    unused_text = tuple(flax.traverse_util.flatten_dict(text, sep="/"))
    source = without_text(source)
  decoder = is_dense(target) and not is_dense(source)
  if decoder:
    source = {collection: {"backbone": tree} for collection, tree in source.items()}
  elif is_dense(source) and not is_dense(target):
    parts = {"params": {n: t for n, t in source["params"].items() if n != "backbone"}}
    unused_text = tuple(flax.traverse_util.flatten_dict(parts, sep="/"))
    source = {collection: tree.get("backbone", {}) for collection, tree in source.items()}
  head = functools.partial(is_head, dense=is_dense(target))
  alone = is_clip(target) and not is_clip(source)
  if alone:
    source = {collection: {"image": tree} for collection, tree in source.items()}
  found = flax.traverse_util.flatten_dict(dict(source), sep="/")
  wanted = flax.traverse_util.flatten_dict(dict(target), sep="/")
  found, fitted, begun = _fitted(found, wanted)
  loaded: list[str] = []
  initialised: list[str] = []
  missing: list[str] = []
  wrong: list[str] = []
  result = {}
  for name, new in wanted.items():
    parts = name.split("/")
    if alone and (parts[1] != "image" or is_head("/".join((parts[0], *parts[2:])))):
      result[name] = new
      initialised.append(f"{name} ({_ALONE[parts[1] == 'image']})")
      continue
    if decoder and parts[1] != "backbone":
      result[name] = new
      initialised.append(f"{name} (no decoder in the source)")
      continue
    old_shape = tuple(found[name].shape) if name in found else None
    if reinitialize_head and head(name) and begins_anew(name, old_shape, new):
      result[name] = new
      reason = f"{old_shape} in the source, {tuple(new.shape)} here" if old_shape else "as asked"
      initialised.append(f"{name} ({reason})")
      continue
    if name not in found:
      result[name] = new
      if name in begun:
        initialised.append(f"{name} ({begun[name]})")
      else:
        missing.append(name)
      continue
    old = found[name]
    if tuple(old.shape) == tuple(new.shape):
      result[name] = np.asarray(old, new.dtype)
      loaded.append(f"{name} ({fitted[name]})" if name in fitted else name)
    elif (resized := _resized(parts[-1], old, tuple(new.shape))) is not None:
      result[name] = np.asarray(resized, new.dtype)
      loaded.append(f"{name} (resized from {tuple(old.shape)} to {tuple(new.shape)})")
    else:
      result[name] = new
      wrong.append(f"{name} ({tuple(old.shape)} in the source, {tuple(new.shape)} here)")
  if wrong and all(map(head, wrong)) and not missing:
    raise ValueError(
      f"the head has another width: {'; '.join(wrong)}. To begin it anew, pass "
      "--config.reinitialize_head=True"
    )
  if wrong or missing:
    example = (wrong or missing)[0]
    raise ValueError(
      f"these weights are of another network: {len(missing)} leaves are missing and {len(wrong)} "
      f"have another shape, e.g. {example}"
    )
  unused = (*(name for name in found if name not in wanted), *unused_text)
  variables = flax.traverse_util.unflatten_dict(result, sep="/")
  for collection in target:
    variables.setdefault(collection, {})
  return variables, TransferReport(tuple(loaded), tuple(initialised), unused)


def is_clip(variables: Mapping[str, Any]) -> bool:
  """Whether {"params", …} are of an image and a text tower, see `models.clip`."""
  return {"image", "text"} <= set(variables["params"])


def without_text(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Of the variables of two towers those of the image tower; others as they are."""
  if not is_clip(variables):
    return dict(variables)
  return {name: tree.get("image", {}) for name, tree in variables.items()}


def is_dense(variables: Mapping[str, Any]) -> bool:
  """Whether {"params", …} are of a backbone with a decoder, see `heads.dense_model`."""
  return "backbone" in variables["params"]


def is_head(name: str, *, dense: bool = False) -> bool:
  """Whether a leaf ("params/head/kernel") is of a classifier, whose width is that of the data.

  Args:
    name: of the leaf.
    dense: whether it is of a backbone with a decoder, whose last layers alone are meant then.
  """
  return re.match(_CLASSIFIER if dense else _HEAD, name) is not None


def begins_anew(name: str, old_shape: tuple[int, ...] | None, new: Any) -> bool:
  """Whether a leaf that goes by the classes begins anew for others; boxes that fit are kept.

  Args:
    name: of the leaf.
    old_shape: of the source's; None where it has none.
    new: the leaf, or its shape.
  """
  return not (_CLASS_BOXES.match(name) and old_shape == tuple(new.shape))


def _resized(leaf: str, old: np.ndarray, shape: tuple[int, ...]) -> jax.Array | None:
  """A table of positions in another shape; None for a leaf that is none, or does not fit."""
  if leaf in _OF_PAIRS and old.shape[0] == shape[0]:
    return _OF_PAIRS[leaf](jax.numpy.asarray(old), (shape[1], shape[2]))
  if leaf in _OF_CELLS and old.shape[1:] == shape[1:]:
    return _OF_CELLS[leaf](jax.numpy.asarray(old), shape[0])
  return None


def _fitted(
  found: dict[str, Any], wanted: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
  """`fit_dense_form` of a network, or of the backbone under a decoder, whose paths are longer."""
  if not any(_BACKBONE.match(name) for name in wanted):
    return fit_dense_form(found, wanted)

  def own(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {_BACKBONE.sub(r"\1/", n): leaf for n, leaf in tree.items() if _BACKBONE.match(n)}

  def placed(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("/", "/backbone/", 1): leaf for name, leaf in tree.items()}

  fitted, changes, begun = fit_dense_form(own(found), own(wanted))
  return {**found, **placed(fitted)}, placed(changes), placed(begun)
