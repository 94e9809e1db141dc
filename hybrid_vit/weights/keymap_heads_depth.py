"""Depth heads: names of transformers' tensors (DPT, GLPN) and of MIM-Depth-Estimation's.

Names begin at the checkpoint's root, since a head's parts lie apart there ("neck.", "decoder.",
"head.").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import Layout, OfficialKey

# How many of our parts with a number in front of them are looked for; no network has more.
_MOST = 9

_MIM_DEPTH: list[torch_keys.Rule] = [
  *(
    rule
    # A norm and an activation stand behind each transposed convolution.
    for i in range(_MOST)
    for rule in (
      (f"deconv{i}", f"decoder.deconv_layers.{3 * i}", torch_keys.deconv),
      (f"deconv{i}_norm", f"decoder.deconv_layers.{3 * i + 1}", torch_keys.norm),
    )
  ),
  ("conv", "decoder.conv_layers.0", torch_keys.conv),
  ("conv_norm", "decoder.conv_layers.1", torch_keys.norm),
  ("depth_conv", "last_layer_depth.0", torch_keys.conv),
  ("depth", "last_layer_depth.2", torch_keys.conv),
]

_FUSION = r"decoder.stages.\1.fusion.convolutional_layer"
_GLPN: list[torch_keys.Rule] = [
  (r"stage(\d+)_conv", r"decoder.stages.\1.convolution", torch_keys.pointwise),
  *(
    rule
    for j in range(2)
    for rule in (
      (rf"stage(\d+)_fusion_conv{j}", f"{_FUSION}{j + 1}.0", torch_keys.conv),
      (rf"stage(\d+)_fusion_norm{j}", f"{_FUSION}{j + 1}.1", torch_keys.norm),
    )
  ),
  (r"stage(\d+)_fusion_conv2", f"{_FUSION}3", torch_keys.conv),
  ("depth_conv", "head.head.0", torch_keys.conv),
  ("depth", "head.head.2", torch_keys.conv),
]

_LEVEL = r"neck.reassemble_stage.layers.\1"
_RESIDUAL = r"neck.fusion_stage.layers.\1.residual_layer\2"
_DPT_DECODER: list[torch_keys.Rule] = [
  (
    r"decoder/level(\d+)_readout",
    r"neck.reassemble_stage.readout_projects.\1.0",
    torch_keys.dense,
  ),
  (r"decoder/level(\d+)_projection", f"{_LEVEL}.projection", torch_keys.pointwise),
  (r"decoder/level(\d+)_up", f"{_LEVEL}.resize", torch_keys.deconv),
  (r"decoder/level(\d+)_down", f"{_LEVEL}.resize", torch_keys.conv),
  (r"decoder/level(\d+)_conv", r"neck.convs.\1", torch_keys.conv),
  (
    r"decoder/fusion(\d+)_projection",
    r"neck.fusion_stage.layers.\1.projection",
    torch_keys.pointwise,
  ),
  (
    r"decoder/fusion(\d+)_residual(\d)_conv(\d)",
    rf"{_RESIDUAL}.convolution\3",
    torch_keys.conv,
  ),
  (r"decoder/fusion(\d+)_residual(\d)_norm(\d)", rf"{_RESIDUAL}.batch_norm\3", torch_keys.norm),
]
_DPT_DEPTH: list[torch_keys.Rule] = [
  *_DPT_DECODER,
  ("projection", "head.projection", torch_keys.conv),
  ("depth_conv0", "head.head.0", torch_keys.conv),
  ("depth_conv1", "head.head.2", torch_keys.conv),
  ("depth", "head.head.4", torch_keys.conv),
]
_DPT_SEGMENTATION: list[torch_keys.Rule] = [
  *_DPT_DECODER,
  *(
    rule
    for ours, theirs in (("", "head.head"), ("auxiliary_", "auxiliary_head.head"))
    for rule in (
      (f"{ours}conv", f"{theirs}.0", torch_keys.conv),
      (f"{ours}norm", f"{theirs}.1", torch_keys.norm),
      (f"{ours}classifier", f"{theirs}.4", torch_keys.conv),
    )
  ),
]

# By the class of a head: the layouts' names and their rules.
DEPTH_HEAD_RULES: Mapping[str, Mapping[str, list[torch_keys.Rule]]] = {
  "MIMDepth": {"official": _MIM_DEPTH},
  "GLPN": {"transformers": _GLPN},
  "DPTDepth": {"transformers": _DPT_DEPTH},
  "DPTSegmentation": {"transformers": _DPT_SEGMENTATION},
}

# Of the coarsest fusion, in the files but in no answer.
_UNUSED_RESIDUAL = "neck.fusion_stage.layers.0.residual_layer1"


def mim_depth_layout(head: Any) -> Layout:
  """MIM-Depth-Estimation's names below its model: "decoder.", "last_layer_depth."."""
  return _of_head(head, _MIM_DEPTH)


def glpn_layout(head: Any) -> Layout:
  """transformers' names of GLPN's "decoder." and "head."."""
  return _of_head(head, _GLPN)


def dpt_depth_layout(head: Any) -> Layout:
  """transformers' names of `DPTForDepthEstimation`'s "neck." and "head."."""
  return dataclasses.replace(_of_head(head, _DPT_DEPTH), **_dpt_extras(head))


def dpt_segmentation_layout(head: Any) -> Layout:
  """transformers' names of `DPTForSemanticSegmentation`'s "neck.", "head.", "auxiliary_head."."""
  return dataclasses.replace(_of_head(head, _DPT_SEGMENTATION), **_dpt_extras(head))


def depth_layouts(model: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of checkpoints of a whole `DenseModel` with one of these heads.

  There is one: transformers' of a ViT under a DPT. The backbones of the others' published files
  are not among ours.

  Args:
    model: the model.
    backbone_layouts: of its backbone.
  """
  head, backbone = model.head, model.backbone
  makers = {"DPTDepth": dpt_depth_layout, "DPTSegmentation": dpt_segmentation_layout}
  maker = makers.get(type(head).__name__)
  kind = type(backbone).__name__
  if maker is None or model.neck is not None or kind != "VisionTransformer":
    return {}
  layout = maker(head)
  of_head = layout.key_map(head)
  of_backbone = backbone_layouts["transformers"].key_map(backbone)
  # What is read are maps of blocks, before the last norm, which need not be there.
  norm = {"dpt.layernorm.weight": np.ones, "dpt.layernorm.bias": np.zeros}
  has_norm = not getattr(backbone, "output_blocks", ())

  def key_map(path: str) -> OfficialKey:
    collection, part, rest = path.split("/", 2)
    if part != "backbone":
      return of_head(f"{collection}/{rest}")
    key = of_backbone(f"{collection}/{rest}")
    return key.renamed(lambda name: "dpt." + name.removeprefix("vit."))

  def constants(_: Any) -> dict[str, np.ndarray]:
    made = layout.constants(head)
    if not has_norm:
      made |= {name: fill((backbone.width,), np.float32) for name, fill in norm.items()}
    return made

  ignored = "" if has_norm else r"|^dpt\.layernorm\."
  return {
    "transformers": Layout(
      key_map=lambda _: key_map, not_weights=layout.not_weights + ignored, constants=constants
    )
  }


def _of_head(head: Any, rules: list[torch_keys.Rule]) -> Layout:
  what = type(head).__name__
  return Layout(
    key_map=lambda _: lambda path: torch_keys.by_rules(rules, path.partition("/")[2], what),
    not_weights=torch_keys.BATCH_NORM_COUNTER,
  )


def _dpt_extras(head: Any) -> dict[str, Any]:
  """`not_weights` and `constants` for what is in the files and takes no part."""
  ignored = [torch_keys.BATCH_NORM_COUNTER, rf"^{_UNUSED_RESIDUAL}\."]
  if not getattr(head, "auxiliary", False):
    ignored.append(r"^auxiliary_head\.")
  return {"not_weights": "|".join(ignored), "constants": _unused_residual}


def _unused_residual(head: Any) -> dict[str, np.ndarray]:
  width = head.channels
  use_bias = not head.use_batch_norm if head.use_bias is None else head.use_bias
  found: dict[str, np.ndarray] = {}
  fills: dict[str, Callable[..., np.ndarray]] = {
    "weight": np.ones, "bias": np.zeros, "running_mean": np.zeros, "running_var": np.ones,
  }  # fmt: skip
  for j in (1, 2):
    name = f"{_UNUSED_RESIDUAL}.convolution{j}"
    found[f"{name}.weight"] = np.zeros((width, width, 3, 3), np.float32)
    if use_bias:
      found[f"{name}.bias"] = np.zeros((width,), np.float32)
    if head.use_batch_norm:
      norm = f"{_UNUSED_RESIDUAL}.batch_norm{j}"
      found |= {f"{norm}.{leaf}": fill((width,), np.float32) for leaf, fill in fills.items()}
  return found
