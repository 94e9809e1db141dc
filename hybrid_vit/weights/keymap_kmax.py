"""kMaX-DeepLab: names of the tensors of its authors' PyTorch code, bytedance/kmax-deeplab.

Paths below a whole model begin with "backbone" and "head"; a head alone has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import Layout, OfficialKey

_Rule = torch_keys.Rule
_PIXELS, _PREDICTOR = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
_BACKBONE = "backbone."


def _conv1d(name: str, leaf: str) -> OfficialKey:
  """A convolution of a sequence there, (out, in, 1), a matrix product here, `[in, out]`."""
  if leaf == "kernel":
    return OfficialKey(f"{name}.weight", lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])
  return OfficialKey(f"{name}.{leaf}")


def _normed(
  pattern: str, replacement: str, layout: Callable[[str, str], OfficialKey]
) -> list[_Rule]:
  """The two parts of a `NormedConv`."""
  return [
    (f"{pattern}/conv", f"{replacement}.conv", layout),
    (f"{pattern}/norm", f"{replacement}.norm", torch_keys.norm),
  ]


_2d = functools.partial(_normed, layout=torch_keys.pointwise)
_1d = functools.partial(_normed, layout=_conv1d)
_spatial = functools.partial(_normed, layout=torch_keys.conv)


def _pixel_decoder() -> list[_Rule]:
  block = rf"{_PIXELS}._stages.\1._blocks.\2"
  ours = r"pixel_decoder/stage(\d+)_block(\d+)"
  rules = [
    (r"pixel_decoder/norm(\d+)", rf"{_PIXELS}._in_norms.\1", torch_keys.norm),
    *_2d(f"{ours}/conv1", f"{block}._conv1_bn_act"),
    *_spatial(f"{ours}/conv2", f"{block}._conv2_bn_act"),
    *_2d(f"{ours}/conv3", f"{block}._conv3_bn"),
    *_2d(f"{ours}/shortcut", f"{block}._shortcut"),
    # The first fusion there is that of our second map.
    *(
      rule
      for i in range(1, 8)
      for side in ("low", "high")
      for rule in _2d(
        f"pixel_decoder/fuse{i}_{side}", f"{_PIXELS}._resized_fuses.{i - 1}._conv_bn_{side}"
      )
    ),
  ]
  for axis in ("height", "width"):
    theirs = f"{block}._attention._{axis}_axis"
    rules += [
      (f"{ours}/{axis}", theirs, _positions),
      (f"{ours}/{axis}/qkv", f"{theirs}.qkv_transform.conv", _conv1d),
      (f"{ours}/{axis}/qkv_norm", f"{theirs}._batch_norm_qkv", torch_keys.norm),
      (f"{ours}/{axis}/similarity_norm", f"{theirs}._batch_norm_similarity", torch_keys.norm),
      (f"{ours}/{axis}/retrieved_norm", f"{theirs}._batch_norm_retrieved_output", torch_keys.norm),
    ]
  return rules


def _positions(name: str, leaf: str) -> OfficialKey:
  kind, _, rest = leaf.partition("_")
  if rest != "positions":
    raise torch_keys.no_such_variable("kMaX", leaf)
  return torch_keys.same(f"{name}._{kind}_rpe._embeddings.weight")


# So is it spelt there.
_PREDICTIONS = "_predcitor"


def _predictor(ours: str, theirs: str) -> list[_Rule]:
  ours, theirs = f"{ours}predictor", f"{theirs}.{_PREDICTIONS}"
  pixels = f"{theirs}._pixel_space_head"
  return [
    *_spatial(f"{ours}/pixel_depthwise", f"{pixels}_conv0bnact"),
    *_2d(f"{ours}/pixel_hidden", f"{pixels}_conv1bnact"),
    *_2d(f"{ours}/pixel_feature", f"{pixels}_last_convbn"),
    *_1d(f"{ours}/mask_kernel", f"{theirs}._transformer_mask_head"),
    (f"{ours}/classifier", f"{theirs}._transformer_class_head.conv", _conv1d),
    (f"{ours}/mask_norm", f"{theirs}._pixel_space_mask_batch_norm", torch_keys.norm),
  ]


def _decoder() -> list[_Rule]:
  ours, layer = r"decoder/layer(\d+)/", rf"{_PREDICTOR}._kmax_transformer_layers.\1"
  attention = f"{layer}._query_self_attention"
  return [
    ("decoder", _PREDICTOR, _centers),
    *_2d(f"{ours}pixel_projection", f"{layer}._pixel_conv1_bn_act"),
    *_1d(f"{ours}query_projection", f"{layer}._query_conv1_bn_act"),
    *_2d(f"{ours}pixel_value", f"{layer}._pixel_v_conv_bn"),
    (f"{ours}update_norm", f"{layer}._kmeans_query_batch_norm_retrieved_value", torch_keys.norm),
    *_1d(f"{ours}update", f"{layer}._kmeans_query_conv3_bn"),
    *_1d(f"{ours}qkv", f"{layer}._query_qkv_conv_bn"),
    (f"{ours}similarity_norm", f"{attention}._batch_norm_similarity", torch_keys.norm),
    (f"{ours}retrieved_norm", f"{attention}._batch_norm_retrieved_value", torch_keys.norm),
    *_1d(f"{ours}attention", f"{layer}._query_conv3_bn"),
    *_1d(f"{ours}fc1", f"{layer}._query_ffn_conv1_bn_act"),
    *_1d(f"{ours}fc2", f"{layer}._query_ffn_conv2_bn"),
    *_predictor(ours, layer),
    *_predictor("decoder/", _PREDICTOR),
    *_1d("decoder/class_projection", f"{_PREDICTOR}._class_embedding_projection"),
    *_1d("decoder/mask_projection", f"{_PREDICTOR}._mask_embedding_projection"),
  ]


def _centers(name: str, leaf: str) -> OfficialKey:
  if leaf != "cluster_centers":
    raise torch_keys.no_such_variable("kMaX", leaf)
  # (channels, queries) there.
  return OfficialKey(f"{name}._cluster_centers.weight", np.transpose, np.transpose)


def _semantic_decoder() -> list[_Rule]:
  ours, theirs = "semantic_decoder", f"{_PREDICTOR}._auxiliary_semantic_predictor"
  rules = [
    *_2d(f"{ours}/aspp_conv", f"{theirs}._aspp._aspp_conv0"),
    *(
      rule
      for i in range(3)
      for rule in _spatial(f"{ours}/aspp_atrous{i}", f"{theirs}._aspp._aspp_conv{i + 1}")
    ),
    *_2d(f"{ours}/aspp_pool", f"{theirs}._aspp._aspp_pool"),
    *_2d(f"{ours}/aspp_projection", f"{theirs}._aspp._proj_conv_bn_act"),
    *_spatial(f"{ours}/hidden_depthwise", f"{theirs}.conv_block_0"),
    *_2d(f"{ours}/hidden", f"{theirs}.conv_block_1"),
    (f"{ours}/classifier", f"{theirs}.final_conv.conv", torch_keys.pointwise),
  ]
  for i, stride in enumerate((4, 8)):
    fusion = f"{theirs}._low_level_fusion_os{stride}"
    rules += [
      *_2d(f"{ours}/low_level{i}", f"{theirs}._low_level_projection_os{stride}"),
      *_spatial(f"{ours}/fusion{i}_depthwise", f"{fusion}_conv0_bn_act"),
      *_2d(f"{ours}/fusion{i}", f"{fusion}_conv1_bn_act"),
    ]
  return rules


HEAD_RULES: list[_Rule] = [*_pixel_decoder(), *_decoder(), *_semantic_decoder()]


def head_key_map(path: str) -> OfficialKey:
  """The key map of a head alone, from "params/decoder/cluster_centers" on."""
  return torch_keys.by_rules(HEAD_RULES, path.partition("/")[2], "kMaX")


def kmax_layouts(backbone: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of whole checkpoints: "official" alone.

  The variables are {"params": {"backbone": …, "head": …}, …}.

  Args:
    backbone: the network below the head.
    backbone_layouts: of its family; "official" are the names of its authors' code.
  """
  inner = backbone_layouts["official"]
  whole = torch_keys.with_backbone(head_key_map, inner.key_map(backbone), _BACKBONE, "kMaX")
  not_weights = torch_keys.pattern_below(inner.not_weights, _BACKBONE)
  return {
    "official": Layout(
      key_map=lambda model: whole,
      not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|{not_weights}",
      rename=functools.partial(torch_keys.renamed_below, _BACKBONE, inner.rename),
    )
  }
