"""Sparse R-CNN's head: names of mmdetection's tensors, `EmbeddingRPNHead` and `DIIHead`."""

from __future__ import annotations

from typing import Any

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import OfficialKey

_Rule = torch_keys.Rule
_TABLES = {
  "proposal_boxes": "rpn_head.init_proposal_bboxes.weight",
  "proposal_features": "rpn_head.init_proposal_features.weight",
}


def sparse_rules(head: Any) -> list[_Rule]:
  """The rules of a whole `SparseHead`."""
  return [("", "", _table), *stage_rules(head, r"stage(\d+)/", r"roi_head.bbox_head.\1.")]


def stage_rules(head: Any, ours: str = "", theirs: str = "") -> list[_Rule]:
  """The rules of one stage.

  Args:
    head: with the numbers of its layers, `SparseHead` or `DynamicStage`.
    ours: pattern of what stands before our names.
    theirs: replacement for it before mmdetection's.
  """
  dense, norm = torch_keys.dense, torch_keys.norm
  interaction = f"{theirs}instance_interactive_conv"
  # A tower holds a matrix, its norm and the activation, over and over.
  towers = [
    rule
    for kind, there, count in (
      ("class", "cls_fcs", head.num_class_fcs),
      ("box", "reg_fcs", head.num_box_fcs),
    )
    for i in range(count)
    for rule in (
      (f"{ours}{kind}_fc{i}", f"{theirs}{there}.{3 * i}", dense),
      (f"{ours}{kind}_norm{i}", f"{theirs}{there}.{3 * i + 1}", norm),
    )
  ]
  return [
    (f"{ours}self_attention/qkv", f"{theirs}attention.attn", torch_keys.stacked),
    (f"{ours}self_attention/out", f"{theirs}attention.attn.out_proj", dense),
    (f"{ours}self_norm", f"{theirs}attention_norm", norm),
    (f"{ours}interaction/kernels", f"{interaction}.dynamic_layer", dense),
    (f"{ours}interaction/norm_in", f"{interaction}.norm_in", norm),
    (f"{ours}interaction/norm_out", f"{interaction}.norm_out", norm),
    (f"{ours}interaction/fc", f"{interaction}.fc_layer", dense),
    (f"{ours}interaction/fc_norm", f"{interaction}.fc_norm", norm),
    (f"{ours}interaction_norm", f"{theirs}instance_interactive_conv_norm", norm),
    (f"{ours}fc1", f"{theirs}ffn.layers.0.0", dense),
    (f"{ours}fc2", f"{theirs}ffn.layers.1", dense),
    (f"{ours}ffn_norm", f"{theirs}ffn_norm", norm),
    *towers,
    (f"{ours}classifier", f"{theirs}fc_cls", dense),
    (f"{ours}deltas", f"{theirs}fc_reg", dense),
  ]


def _table(scope: str, leaf: str) -> OfficialKey:
  del scope
  if leaf not in _TABLES:
    raise torch_keys.no_such_variable("SparseHead", leaf)
  return torch_keys.same(_TABLES[leaf])
