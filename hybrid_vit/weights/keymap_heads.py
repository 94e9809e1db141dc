"""Heads and necks: names of mmsegmentation's, torchvision's, detectron2's and others' tensors.

A layout maps a path below a head ("lateral0/conv/kernel") to a tensor below the head's own name in
the checkpoint ("lateral_convs.0.conv.weight"); `dense_layouts` puts the parts of a whole model
together.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import Layout, OfficialKey
from hybrid_vit.weights.keymap_heads_depth import DEPTH_HEAD_RULES, depth_layouts

_Rule = torch_keys.Rule


def _conv_norm(pattern: str, replacement: str, norm: str) -> list[_Rule]:
  """The two parts of a `ConvNorm`."""
  return [
    (f"{pattern}/conv", f"{replacement}.conv", torch_keys.conv),
    (f"{pattern}/norm", f"{replacement}.{norm}", torch_keys.norm),
  ]


def _upernet(norm: str, classifier: str) -> list[_Rule]:
  return [
    *_conv_norm(r"lateral(\d+)", r"lateral_convs.\1", norm),
    *_conv_norm(r"output(\d+)", r"fpn_convs.\1", norm),
    *_conv_norm(r"pool(\d+)", r"psp_modules.\1.1", norm),
    *_conv_norm("pool_fusion", "bottleneck", norm),
    *_conv_norm("fusion", "fpn_bottleneck", norm),
    ("classifier", classifier, torch_keys.conv),
  ]


def _fcn(norm: str, classifier: str) -> list[_Rule]:
  return [
    *_conv_norm(r"conv(\d+)", r"convs.\1", norm),
    *_conv_norm("conv_cat", "conv_cat", norm),
    ("classifier", classifier, torch_keys.conv),
  ]


_SEMANTIC_FPN: list[_Rule] = [
  # An up-sampling stands between two convolutions.
  *(
    rule
    for i in range(8)
    for rule in _conv_norm(rf"level(\d+)_conv{i}", rf"scale_heads.\1.{2 * i}", "bn")
  ),
  ("classifier", "conv_seg", torch_keys.conv),
]
_SEGFORMER: list[_Rule] = [
  (r"linear(\d+)", r"linear_c.\1.proj", torch_keys.dense),
  ("fusion/conv", "linear_fuse", torch_keys.conv),
  ("fusion/norm", "batch_norm", torch_keys.norm),
  ("classifier", "classifier", torch_keys.conv),
]
# ReLU or max-pooling is no tensor; in the published files the extra levels follow the others.
_FEATURE2PYRAMID: list[_Rule] = [
  ("up4_0", "upsample_4x.0", torch_keys.deconv),
  ("up4_norm", "upsample_4x.1", torch_keys.norm),
  ("up4_1", "upsample_4x.3", torch_keys.deconv),
  ("up2", "upsample_2x.0", torch_keys.deconv),
]
# Places in detectron2's Sequentials, which hold the activations and the pooling, too.
_SIMPLE_PYRAMID: list[_Rule] = [
  ("up4_0", "simfp_2.0", torch_keys.deconv),
  ("up4_norm", "simfp_2.1", torch_keys.norm),
  ("up4_1", "simfp_2.3", torch_keys.deconv),
  ("up2", "simfp_3.0", torch_keys.deconv),
  *(
    rule
    for level, first in ((2, 4), (3, 1), (4, 0), (5, 1))
    for i in range(2)
    for rule in (
      (f"p{level}_conv{i}", f"simfp_{level}.{first + i}", torch_keys.conv),
      (f"p{level}_norm{i}", f"simfp_{level}.{first + i}.norm", torch_keys.norm),
    )
  ),
]


def fpn_rules(levels: int) -> list[_Rule]:
  """mmdetection's and mmsegmentation's FPN; its extra levels are counted on from the others."""
  return [
    (r"lateral(\d+)", r"lateral_convs.\1.conv", torch_keys.conv),
    (r"output(\d+)", r"fpn_convs.\1.conv", torch_keys.conv),
    *((f"extra{i}", f"fpn_convs.{levels + i}.conv", torch_keys.conv) for i in range(4)),
  ]


TORCHVISION_FPN: list[_Rule] = [
  (r"lateral(\d+)", r"inner_blocks.\1.0", torch_keys.conv),
  (r"output(\d+)", r"layer_blocks.\1.0", torch_keys.conv),
  ("extra0", "extra_blocks.p6", torch_keys.conv),
  ("extra1", "extra_blocks.p7", torch_keys.conv),
]


def _tf(name: str, leaf: str) -> OfficialKey:
  """TensorFlow's convolutions lie as ours do; its norms have names of their own."""
  names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
  return OfficialKey(f"{name}/{names[leaf] if '/batch_norm' in name else leaf}")


def _tf_depthwise(name: str, leaf: str) -> OfficialKey:
  del leaf
  swap = lambda x: np.transpose(x, (0, 1, 3, 2))  # noqa: E731
  return OfficialKey(f"{name}/depthwise_kernel", swap, swap)


def _tf_conv_norm(pattern: str, replacement: str) -> list[_Rule]:
  return [
    (f"{pattern}/conv", f"{replacement}/conv", _tf),
    (f"{pattern}/norm", f"{replacement}/batch_norm", _tf),
  ]


def deeplab_rules() -> list[_Rule]:
  """deeplab2's names of DeepLabV3+."""
  aspp, fuse = "DeepLabv3Plus/ASPP", "DeepLabv3Plus/fuse"
  return [
    *_tf_conv_norm("aspp_conv", f"{aspp}/conv_bn_act"),
    *(
      rule
      for i in range(3)
      for rule in _tf_conv_norm(f"aspp_atrous{i}", f"{aspp}/aspp_conv{i + 1}/conv_bn_act")
    ),
    *_tf_conv_norm("aspp_pool", f"{aspp}/aspp_pool/conv_bn_act"),
    *_tf_conv_norm("aspp_projection", f"{aspp}/proj_conv_bn_act"),
    *_tf_conv_norm("low_level", "DeepLabv3Plus/project_conv_bn_act"),
    *(
      rule
      for i in range(2)
      for rule in (
        (
          f"decoder{i}_depthwise",
          f"{fuse}/conv{i + 1}_bn_act/depthwise/depthwise_conv",
          _tf_depthwise,
        ),
        (f"decoder{i}_depthwise_norm", f"{fuse}/conv{i + 1}_bn_act/depthwise/batch_norm", _tf),
        *_tf_conv_norm(f"decoder{i}_pointwise", f"{fuse}/conv{i + 1}_bn_act/pointwise"),
      )
    ),
    ("classifier", "DeepLabv3Plus/final_conv/conv", _tf),
  ]


# By the class of a head or neck: the layouts' names and their rules.
HEAD_RULES: Mapping[str, Mapping[str, list[_Rule]]] = {
  "UPerNet": {
    "mmseg": _upernet("bn", "conv_seg"),
    "transformers": _upernet("batch_norm", "classifier"),
  },
  "FCN": {"mmseg": _fcn("bn", "conv_seg"), "transformers": _fcn("batch_norm", "classifier")},
  "SemanticFPN": {"mmseg": _SEMANTIC_FPN},
  "SegFormerHead": {"transformers": _SEGFORMER},
  "FPN": {"mmseg": fpn_rules(4), "torchvision": TORCHVISION_FPN},
  "Feature2Pyramid": {"mmseg": _FEATURE2PYRAMID},
  "SimplePyramid": {"detectron2": _SIMPLE_PYRAMID},
  "DeepLabV3Plus": {"deeplab2": deeplab_rules()},
  **DEPTH_HEAD_RULES,
}

# Where the parts of a model lie in a checkpoint; deeplab2 names its decoder within.
_USUAL = {"neck": "neck.", "head": "decode_head.", "auxiliary_head": "auxiliary_head."}
_PLACES: Mapping[str, Mapping[str, str]] = {
  "mmseg": _USUAL,
  "openmmlab": _USUAL,
  "transformers": _USUAL,
  "deeplab2": {"head": ""},
}
# Layouts of the decoder and of the backbone, where they have other names than the whole's.
_OF_DECODER = {"openmmlab": "mmseg"}
_OF_BACKBONE = {"mmseg": "official", "deeplab2": "official"}


def part_key_map(part: Any, layout: str, prefix: str = "") -> Callable[[str], OfficialKey]:
  """The key map of a head or a neck alone, from "params/lateral0/conv/kernel" on.

  Args:
    part: a head or neck.
    layout: "mmseg", "transformers", …
    prefix: before every name.

  Raises:
    ValueError: a layout that is not known of this part.
  """
  kind = type(part).__name__
  known = HEAD_RULES.get(kind, {})
  if layout not in known:
    raise ValueError(f"{kind} has no layout {layout!r}; it has: {', '.join(known) or 'none'}")

  def key_map(path: str) -> OfficialKey:
    return torch_keys.by_rules(known[layout], path.partition("/")[2], kind).below(prefix)

  return key_map


def dense_layouts(model: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of checkpoints of a whole `DenseModel`, by the names of those of its parts.

  Args:
    model: the model.
    backbone_layouts: of its backbone; in files of training with mmseg ("mmseg") the authors' own
      names stand below "backbone.", in those of networks that are OpenMMLab's own ("openmmlab")
      and in those of transformers theirs.
  """
  if type(model.head).__name__ in DEPTH_HEAD_RULES:
    return depth_layouts(model, backbone_layouts)
  parts = {
    name: getattr(model, name)
    for name in ("neck", "head", "auxiliary_head")
    if getattr(model, name) is not None
  }
  found = {}
  for layout, places in _PLACES.items():
    decoder = _OF_DECODER.get(layout, layout)
    if any(decoder not in HEAD_RULES.get(type(part).__name__, {}) for part in parts.values()):
      continue
    of_backbone = backbone_layouts.get(_OF_BACKBONE.get(layout, layout))
    if of_backbone is None:
      continue
    maps = {name: part_key_map(part, decoder, places.get(name, "")) for name, part in parts.items()}
    prefix = "" if layout == "deeplab2" else "backbone."
    spelled = _spelling(model.backbone, layout)
    found[layout] = Layout(
      key_map=functools.partial(
        _whole_of, maps, of_backbone.key_map(model.backbone), prefix, spelled
      ),
      not_weights=rf"{_inside(of_backbone.not_weights, prefix)}|{torch_keys.BATCH_NORM_COUNTER}"
      + (r"|^backbone\.layernorm\." if layout == "transformers" else ""),
      rename=functools.partial(_renamed, of_backbone.rename, prefix, spelled),
      constants=functools.partial(_constants, of_backbone, prefix),
    )
  return found


def _spelling(backbone: Any, layout: str) -> tuple[str, str]:
  """What stands before a backbone's own names in the networks' files, and here instead."""
  if layout != "transformers":
    return "", ""
  name = f"{type(backbone).__name__.lower()}."
  # Its backbone holds the whole network; those of Swin and ConvNeXt are its parts, in the files.
  return name, name if name == "focalnet." else ""


def _inside(pattern: str, prefix: str) -> str:
  """A pattern of a backbone's names → of the same names behind a prefix."""
  return rf"(?:{pattern.replace('^', '^' + re.escape(prefix))})"


def _renamed(rename: Callable[[str], str], prefix: str, spelled: tuple[str, str], name: str) -> str:
  """The one spelling of a name: transformers 5 has "backbone.swin.encoder", 4 no "swin."."""
  if not prefix or not name.startswith(prefix):
    return name
  inner, (theirs, ours) = name.removeprefix(prefix), spelled
  if not inner.startswith((theirs, "hidden_states_norms.")):
    inner = theirs + inner
  inner = rename(inner)
  return prefix + (ours + inner.removeprefix(theirs) if inner.startswith(theirs) else inner)


def _constants(of_backbone: Layout, prefix: str, model: Any) -> dict[str, np.ndarray]:
  return {prefix + name: value for name, value in of_backbone.constants(model.backbone).items()}


def _whole_of(
  maps: Mapping[str, Callable[[str], OfficialKey]],
  backbone: Callable[[str], OfficialKey],
  prefix: str,
  spelled: tuple[str, str],
  model: Any,
) -> Callable[[str], OfficialKey]:
  del model  # the parts are taken from it already
  theirs, ours = spelled

  def placed(name: str) -> str:
    inside = bool(theirs) and name.startswith(theirs)
    return prefix + (ours + name.removeprefix(theirs) if inside else name)

  def key_map(path: str) -> OfficialKey:
    collection, part, rest = path.split("/", 2)
    if part == "backbone":
      return backbone(f"{collection}/{rest}").renamed(placed)
    return maps[part](f"{collection}/{rest}")

  return key_map
