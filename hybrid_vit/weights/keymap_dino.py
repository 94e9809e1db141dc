"""DINO: names of the tensors of IDEA-Research/DINO ("official").

Its files repeat the decoder's heads, which its layers share, under the names of all layers, once
below the decoder and once at the top. FocalNet-DINO has the same names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

_Rule = torch_keys.Rule

# Ours to theirs: parameters that belong to no layer.
_TABLES = {
  "level_embedding": "transformer.level_embed",
  "query_features": "transformer.tgt_embed.weight",
  "label_embedding": "label_enc.weight",
}
_ATTENTION = {
  "offsets": "sampling_offsets",
  "weights": "attention_weights",
  "value": "value_proj",
  "out": "output_proj",
}


def head_key_map(head: Any) -> KeyMap:
  """The key map of a head alone, from "params/query_features" on, with the checkpoint's names.

  Args:
    head: `DINONetwork`.
  """
  rules = _rules(head)

  def key_map(path: str) -> OfficialKey:
    return torch_keys.by_rules(rules, path.partition("/")[2], "DINO")

  return key_map


def dino_layouts(model: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of checkpoints of a whole detector, by name.

  Args:
    model: `DINO`.
    backbone_layouts: of its backbone; in the files stand the names of its authors, in ResNet's case
      torchvision's.
  """
  inner = backbone_layouts.get("official")
  if inner is None:
    return {}
  prefix = backbone_prefix(model)
  return {
    "official": Layout(
      key_map=functools.partial(_whole_of, inner),
      not_weights=rf"{torch_keys.pattern_below(inner.not_weights, prefix)}|"
      rf"{torch_keys.BATCH_NORM_COUNTER}",
      rename=functools.partial(_renamed, inner.rename, prefix),
    )
  }


def backbone_prefix(model: Any) -> str:
  """What stands before the names of a detector's backbone."""
  return "backbone.0.body." if type(model.backbone).__name__ == "ResNet" else "backbone.0."


def _renamed(rename: Callable[[str], str], prefix: str, name: str) -> str:
  name = name.removeprefix("module.")  # of training on several devices
  return torch_keys.renamed_below(prefix, rename, name)


def _whole_of(backbone: Layout, model: Any) -> KeyMap:
  head, inner = head_key_map(model.head), backbone.key_map(model.backbone)
  return torch_keys.with_backbone(head, inner, backbone_prefix(model), "DINO")


def _rules(head: Any) -> list[_Rule]:
  conv, dense, norm = torch_keys.conv, torch_keys.dense, torch_keys.norm
  encoder = r"transformer.encoder.layers.\1"
  decoder = r"transformer.decoder.layers.\1"
  boxes = "transformer.enc_out_bbox_embed"
  return [
    ("", "", _table),
    (r"projection(\d+)", r"input_proj.\1.0", conv),
    (r"projection(\d+)_norm", r"input_proj.\1.1", norm),
    *_sampling(r"encoder(\d+)/attention", f"{encoder}.self_attn"),
    (r"encoder(\d+)/(norm[12])", rf"{encoder}.\2", norm),
    (r"encoder(\d+)/fc([12])", rf"{encoder}.linear\2", dense),
    ("proposal", "transformer.enc_output", dense),
    ("proposal_norm", "transformer.enc_output_norm", norm),
    ("encoder_classifier", "transformer.enc_out_class_embed", dense),
    (r"encoder_boxes/fc(\d)", rf"{boxes}.layers.\1", dense),
    (r"decoder(\d+)/self_attention/qkv", f"{decoder}.self_attn", torch_keys.stacked),
    (r"decoder(\d+)/self_attention/out", f"{decoder}.self_attn.out_proj", dense),
    # Numbered in the order of DETR's layers, which is not that of the computation.
    (r"decoder(\d+)/self_norm", f"{decoder}.norm2", norm),
    *_sampling(r"decoder(\d+)/cross_attention", f"{decoder}.cross_attn"),
    (r"decoder(\d+)/cross_norm", f"{decoder}.norm1", norm),
    (r"decoder(\d+)/fc([12])", rf"{decoder}.linear\2", dense),
    (r"decoder(\d+)/ffn_norm", f"{decoder}.norm3", norm),
    ("decoder_norm", "transformer.decoder.norm", norm),
    (r"query_position(\d)", r"transformer.decoder.ref_point_head.layers.\1", dense),
    (r"classifier(\d+)", r"class_embed.\1", _repeated(head)),
    (r"boxes(\d+)/fc(\d)", r"bbox_embed.\1.layers.\2", _repeated(head)),
  ]


def _table(name: str, leaf: str) -> OfficialKey:
  del name
  if leaf not in _TABLES:
    raise torch_keys.no_such_variable("DINO", leaf)
  return torch_keys.same(_TABLES[leaf])


def _repeated(head: Any) -> Callable[[str, str], OfficialKey]:
  """The tensor of a decoder's head, "class_embed.0": its layers' copies are aliases."""

  def factory(name: str, leaf: str) -> OfficialKey:
    key = torch_keys.dense(name, leaf)
    kind, own, *rest = key.name.split(".")
    layers = range(head.decoder_layers) if head.shared_heads else (own,)
    names = [
      ".".join([f"{place}{kind}", str(layer), *rest])
      for place in ("transformer.decoder.", "")
      for layer in layers
    ]
    return dataclasses.replace(key, name=names[0], aliases=tuple(names[1:]))

  return factory


def _sampling(ours: str, theirs: str) -> list[_Rule]:
  """A `DeformableAttention`."""
  return [(f"{ours}/{a}", f"{theirs}.{b}", torch_keys.dense) for a, b in _ATTENTION.items()]
