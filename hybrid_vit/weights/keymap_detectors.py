"""Detectors: names of mmdetection 2's, torchvision's and detectron2's tensors.

torchvision's first class is background, ours the last, as in the others: rows of its classifiers
are moved. It has boxes and masks of background, too, which nothing reads: they are left out, and
written as zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey
from hybrid_vit.weights.keymap_heads import HEAD_RULES, TORCHVISION_FPN, fpn_rules
from hybrid_vit.weights.keymap_sparse_rcnn import sparse_rules

_Rule = torch_keys.Rule
_Factory = Callable[[str, str], OfficialKey]
LAYOUTS = ("mmdetection", "torchvision", "detectron2")


def _background_last(factory: _Factory) -> _Factory:
  """Rows of a classifier whose background is first there."""

  def changed(name: str, leaf: str) -> OfficialKey:
    key = factory(name, leaf)
    return dataclasses.replace(
      key,
      to_ours=lambda x: key.to_ours(np.roll(x, -1, axis=0)),
      to_theirs=lambda x: np.roll(key.to_theirs(x), 1, axis=0),
    )

  return changed


def _without_background(factory: _Factory, rows: int) -> _Factory:
  """The first `rows` rows there are background's, which we have not."""

  def changed(name: str, leaf: str) -> OfficialKey:
    key = factory(name, leaf)

    def to_theirs(x: np.ndarray) -> np.ndarray:
      written = key.to_theirs(x)
      return np.concatenate([np.zeros((rows, *written.shape[1:]), written.dtype), written])

    return dataclasses.replace(key, to_ours=lambda x: key.to_ours(x[rows:]), to_theirs=to_theirs)

  return changed


def _rpn(layout: str, convs: int) -> list[_Rule]:
  if layout == "mmdetection":
    conv = "rpn_conv" if convs == 1 else r"rpn_conv.\1.conv"
    names = (f"rpn_head.{conv}", "rpn_head.rpn_cls", "rpn_head.rpn_reg")
  elif layout == "torchvision":
    names = (r"rpn.head.conv.\1.0", "rpn.head.cls_logits", "rpn.head.bbox_pred")
  else:
    head = "proposal_generator.rpn_head"
    conv = "conv" if convs == 1 else r"conv.conv\1"
    names = (f"{head}.{conv}", f"{head}.objectness_logits", f"{head}.anchor_deltas")
  ours = (r"conv(\d+)", "objectness", "deltas")
  return [(a, b, torch_keys.conv) for a, b in zip(ours, names)]


def _places(names: Sequence[tuple[str, str, _Factory]]) -> list[_Rule]:
  return [(re.escape(ours), theirs, factory) for ours, theirs, factory in names]


def _box_head(layout: str, place: str, head: Any) -> list[_Rule]:
  conv, norm = torch_keys.conv, torch_keys.norm
  dense: _Factory = torch_keys.dense
  convs, fcs = range(head.num_convs), range(head.num_fcs)
  if layout == "mmdetection":
    root = f"roi_head.bbox_head{place}"
    convs_of = lambda i: (f"{root}.shared_convs.{i}.conv", f"{root}.shared_convs.{i}.bn")  # noqa: E731
    fc_of = lambda i: f"{root}.shared_fcs.{i}"  # noqa: E731
    last = [("classifier", f"{root}.fc_cls", dense), ("deltas", f"{root}.fc_reg", dense)]
  elif layout == "torchvision":
    root, predictor = "roi_heads.box_head", "roi_heads.box_predictor"
    convs_of = lambda i: (f"{root}.{i}.0", f"{root}.{i}.1")  # noqa: E731
    # Convolutions and a Flatten stand before the linear layer, in one Sequential.
    fc_of = lambda i: f"{root}.{head.num_convs + 1 + 2 * i}" if convs else f"{root}.fc{6 + i}"  # noqa: E731
    rows = 0 if head.class_agnostic else 4
    last = [
      ("classifier", f"{predictor}.cls_score", _background_last(dense)),
      ("deltas", f"{predictor}.bbox_pred", _without_background(dense, rows)),
    ]
  else:
    root, predictor = f"roi_heads.box_head{place}", f"roi_heads.box_predictor{place}"
    convs_of = lambda i: (f"{root}.conv{i + 1}", f"{root}.conv{i + 1}.norm")  # noqa: E731
    fc_of = lambda i: f"{root}.fc{i + 1}"  # noqa: E731
    last = [("classifier", f"{predictor}.cls_score", dense),
            ("deltas", f"{predictor}.bbox_pred", dense)]  # fmt: skip
  names = [(f"conv{i}", convs_of(i)[0], conv) for i in convs]
  names += [(f"conv{i}_norm", convs_of(i)[1], norm) for i in convs]
  return _places([*names, *((f"fc{i}", fc_of(i), dense) for i in fcs), *last])


def _mask_head(layout: str, place: str, head: Any) -> list[_Rule]:
  conv, deconv, norm = torch_keys.conv, torch_keys.deconv, torch_keys.norm
  names: list[tuple[str, str, _Factory]] = []
  if layout == "mmdetection":
    root = f"roi_head.mask_head{place}"
    convs = [(f"{root}.convs.{i}.conv", f"{root}.convs.{i}.bn") for i in range(head.num_convs)]
    names = [("upsample", f"{root}.upsample", deconv), ("classifier", f"{root}.conv_logits", conv)]
  elif layout == "torchvision":
    root, predictor = "roi_heads.mask_head", "roi_heads.mask_predictor"
    convs = [(f"{root}.{i}.0", f"{root}.{i}.1") for i in range(head.num_convs)]
    classifier = _without_background(conv, 1)
    names = [
      ("upsample", f"{predictor}.conv5_mask", deconv),
      ("classifier", f"{predictor}.mask_fcn_logits", classifier),
    ]
  else:
    root = f"roi_heads.mask_head{place}"
    one = [f"{root}.mask_fcn{i + 1}" for i in range(head.num_convs)]
    convs = [(name, f"{name}.norm") for name in one]
    names = [("upsample", f"{root}.deconv", deconv), ("classifier", f"{root}.predictor", conv)]
  for i, (of_conv, of_norm) in enumerate(convs):
    names += [(f"conv{i}", of_conv, conv), (f"conv{i}_norm", of_norm, norm)]
  return _places(names)


def _neck(layout: str, neck: Any) -> list[_Rule]:
  kind, levels = type(neck).__name__, len(neck.features)
  if kind == "SimplePyramid" and layout == "detectron2":
    rules, prefix = HEAD_RULES[kind]["detectron2"], "backbone."
  elif kind != "FPN":
    raise ValueError(f"{kind} has no layout {layout!r} in detectors")
  elif layout == "mmdetection":
    rules, prefix = fpn_rules(levels), "neck."
  elif layout == "torchvision":
    rules, prefix = TORCHVISION_FPN, "backbone.fpn."
  else:
    # By the logarithm of the stride.
    places = [level.stride.bit_length() - 1 for level in neck.outputs]
    names = [(f"lateral{i}", f"fpn_lateral{places[i]}", torch_keys.conv) for i in range(levels)]
    names += [(f"output{i}", f"fpn_output{places[i]}", torch_keys.conv) for i in range(levels)]
    names += [(f"extra{i}", f"top_block.p{6 + i}", torch_keys.conv) for i in range(2)]
    rules, prefix = _places(names), "backbone."
  return [(a, prefix + b, factory) for a, b, factory in rules]


def _dense_head(head: Any) -> list[_Rule]:
  """mmdetection's RetinaHead and ATSSHead."""
  conv, norm, root = torch_keys.conv, torch_keys.norm, "bbox_head"
  rules: list[_Rule] = [
    (r"class_conv(\d+)", rf"{root}.cls_convs.\1.conv", conv),
    (r"box_conv(\d+)", rf"{root}.reg_convs.\1.conv", conv),
    (r"class_conv(\d+)_norm", rf"{root}.cls_convs.\1.gn", norm),
    (r"box_conv(\d+)_norm", rf"{root}.reg_convs.\1.gn", norm),
    (r"scale(\d+)", rf"{root}.scales.\1", lambda name, leaf: torch_keys.same(f"{name}.{leaf}")),
  ]
  kind = "retina" if type(head).__name__ == "RetinaHead" else "atss"
  names = (("classifier", "cls"), ("deltas", "reg"), ("centerness", "centerness"))
  return [*rules, *((ours, f"{root}.{kind}_{theirs}", conv) for ours, theirs in names)]


def detector_key_map(model: Any, layout: str, backbone: KeyMap | None = None) -> KeyMap:
  """The key map of a whole detector, from "params/rpn/conv0/kernel" on.

  Args:
    model: `RCNN`, `RetinaNet`, `ATSS` or `SparseRCNN`.
    layout: one of `LAYOUTS`.
    backbone: of the backbone alone, whose names stand behind "backbone.", in torchvision's files
      behind "backbone.body.", in detectron2's behind "backbone.bottom_up.", or "backbone.net." of a
      plain transformer; None where no leaf of it is asked for.

  Raises:
    ValueError: another layout, or a part that it does not know.
  """
  if layout not in LAYOUTS:
    raise ValueError(f"detectors have no layout {layout!r}; they have: {', '.join(LAYOUTS)}")
  rules: dict[str, list[_Rule]] = {}
  neck = getattr(model, "neck", None)
  if neck is not None:
    rules["neck"] = _neck(layout, neck)
  if hasattr(model, "stages"):
    rules["rpn"] = _rpn(layout, model.rpn.num_convs)
    several = len(model.stages) > 1
    if layout == "torchvision" and several:
      raise ValueError("torchvision has no cascade")
    for i, head in enumerate(model.stages):
      rules[f"box_head{i}"] = _box_head(layout, f".{i}" if several else "", head)
    for i, head in enumerate(model.mask_heads):
      place = f".{i}" if len(model.mask_heads) > 1 else ""
      rules[f"mask_head{i}"] = _mask_head(layout, place, head)
  elif layout != "mmdetection":
    raise ValueError(f"{type(model).__name__} has no layout {layout!r}; it has: mmdetection")
  else:
    sparse = type(model.head).__name__ == "SparseHead"
    rules["head"] = sparse_rules(model.head) if sparse else _dense_head(model.head)
  prefix = backbone_prefix(model, layout)

  def key_map(path: str) -> OfficialKey:
    collection, part, rest = path.split("/", 2)
    if part == "backbone" and backbone is not None:
      return backbone(f"{collection}/{rest}").below(prefix)
    if part not in rules:
      raise torch_keys.no_such_variable(type(model).__name__, path)
    return torch_keys.by_rules(rules[part], rest, part)

  return key_map


def detector_layouts(model: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of checkpoints of a whole detector, by name; those that its parts have.

  Args:
    model: the detector.
    backbone_layouts: of its backbone; in files of training with mmdetection ("mmdetection"),
      torchvision and detectron2 the authors' own names stand behind a prefix, in those of networks
      that are OpenMMLab's own ("openmmlab") theirs.
  """
  found = {}
  for name in (*LAYOUTS, "openmmlab"):
    layout = "mmdetection" if name == "openmmlab" else name
    inner = backbone_layouts.get("openmmlab" if name == "openmmlab" else "official")
    try:
      detector_key_map(model, layout)
    except ValueError:
      continue
    if inner is None:
      continue
    prefix = backbone_prefix(model, layout)
    not_weights = inner.not_weights.replace("^", "^" + re.escape(prefix))
    found[name] = Layout(
      key_map=functools.partial(_whole_of, layout, inner),
      not_weights=rf"(?:{not_weights})|{torch_keys.BATCH_NORM_COUNTER}|{_NO_WEIGHTS}",
      rename=functools.partial(_renamed, inner.rename, prefix),
      constants=functools.partial(_constants, inner, prefix),
    )
  return found


def backbone_prefix(model: Any, layout: str) -> str:
  """What stands before the names of a detector's backbone."""
  if layout == "detectron2":
    plain = type(model.neck).__name__ == "SimplePyramid"
    return "backbone.net." if plain else "backbone.bottom_up."
  return "backbone.body." if layout == "torchvision" else "backbone."


def _whole_of(layout: str, backbone: Layout, model: Any) -> KeyMap:
  return detector_key_map(model, layout, backbone.key_map(model.backbone))


def _renamed(rename: Callable[[str], str], prefix: str, name: str) -> str:
  return prefix + rename(name.removeprefix(prefix)) if name.startswith(prefix) else name


def _constants(backbone: Layout, prefix: str, model: Any) -> dict[str, np.ndarray]:
  return {prefix + name: value for name, value in backbone.constants(model.backbone).items()}


# detectron2's buffers of anchors and of the pictures' mean.
_NO_WEIGHTS = r"anchor_generator\.cell_anchors|^pixel_(mean|std)$"
