"""DINO: names of the tensors of IDEA-Research/DINO ("official") and of IDEA-Research/detrex.

The files repeat the decoder's heads, which in the authors' its layers share, under the names of all
layers, once below the decoder and once at the top. FocalNet-DINO has the authors' names. detrex
counts the encoder's heads as one more of the decoder's, and builds layers as mmcv does.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

_Rule = torch_keys.Rule

LAYOUTS = ("official", "detrex")

# Ours to theirs: parameters that belong to no layer.
_TABLES = {
  "official": {
    "level_embedding": "transformer.level_embed",
    "query_features": "transformer.tgt_embed.weight",
    "label_embedding": "label_enc.weight",
  },
  "detrex": {
    "level_embedding": "transformer.level_embeds",
    "query_features": "transformer.tgt_embed.weight",
    "label_embedding": "label_enc.weight",
  },
}
_ATTENTION = {
  "offsets": "sampling_offsets",
  "weights": "attention_weights",
  "value": "value_proj",
  "out": "output_proj",
}


def head_key_map(head: Any, layout: str = "official") -> KeyMap:
  """The key map of a head alone, from "params/query_features" on, with the checkpoint's names.

  Args:
    head: `DINONetwork`.
    layout: one of `LAYOUTS`.
  """
  rules = _rules(head) if layout == "official" else _detrex_rules(head)

  def key_map(path: str) -> OfficialKey:
    return torch_keys.by_rules(rules, path.partition("/")[2], "DINO")

  return key_map


def dino_layouts(model: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of checkpoints of a whole detector, by name.

  Args:
    model: `DINO`.
    backbone_layouts: of its backbone; in the files stand the names of its authors, in ResNet's case
      torchvision's, or in detrex's detectron2's.
  """
  inner = backbone_layouts.get("official")
  if inner is None:
    return {}
  found = {}
  for layout in LAYOUTS:
    prefix = backbone_prefix(model, layout)
    within = torch_keys.pattern_below(inner.not_weights, prefix)
    found[layout] = Layout(
      key_map=functools.partial(_whole_of, inner, layout),
      not_weights=rf"(?:{within})|{torch_keys.BATCH_NORM_COUNTER}",
      rename=functools.partial(_renamed, inner.rename, prefix),
      constants=functools.partial(_constants, inner, prefix),
    )
  return found


def backbone_prefix(model: Any, layout: str = "official") -> str:
  """What stands before the names of a detector's backbone."""
  if layout == "detrex":
    return "backbone."
  return "backbone.0.body." if _is_resnet(model) else "backbone.0."


def _is_resnet(model: Any) -> bool:
  return type(model.backbone).__name__ == "ResNet"


def _renamed(rename: Callable[[str], str], prefix: str, name: str) -> str:
  name = name.removeprefix("module.")  # of training on several devices
  return torch_keys.renamed_below(prefix, rename, name)


def _constants(backbone: Layout, prefix: str, model: Any) -> dict[str, np.ndarray]:
  return {prefix + name: value for name, value in backbone.constants(model.backbone).items()}


def _whole_of(backbone: Layout, layout: str, model: Any) -> KeyMap:
  head, inner = head_key_map(model.head, layout), backbone.key_map(model.backbone)
  prefix = backbone_prefix(model, layout)
  if layout == "detrex" and _is_resnet(model):
    return torch_keys.with_backbone(
      head, lambda path: inner(path).renamed(_of_detectron2), prefix, "DINO"
    )
  return torch_keys.with_backbone(head, inner, prefix, "DINO")


def _of_detectron2(name: str) -> str:
  """torchvision's name of a ResNet's tensor → detectron2's."""
  name = re.sub(
    r"^(conv|bn)1\.", lambda m: f"stem.{'conv1' if m[1] == 'conv' else 'conv1.norm'}.", name
  )
  name = re.sub(r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
  name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
  return name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def _rules(head: Any) -> list[_Rule]:
  conv, dense, norm = torch_keys.conv, torch_keys.dense, torch_keys.norm
  encoder = r"transformer.encoder.layers.\1"
  decoder = r"transformer.decoder.layers.\1"
  boxes = "transformer.enc_out_bbox_embed"
  return [
    ("", "", _table("official")),
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


def _detrex_rules(head: Any) -> list[_Rule]:
  conv, dense, norm = torch_keys.conv, torch_keys.dense, torch_keys.norm
  encoder = r"transformer.encoder.layers.\1"
  decoder = r"transformer.decoder.layers.\1"
  # Levels that are maps of the backbone, and those made of the coarsest.
  maps, last = len(head.features), head.decoder_layers
  levels = [
    (i, f"neck.convs.{i}" if i < maps else f"neck.extra_convs.{i - maps}")
    for i in range(head.num_levels)
  ]
  return [
    ("", "", _table("detrex")),
    *((f"projection{i}", f"{name}.conv", conv) for i, name in levels),
    *((f"projection{i}_norm", f"{name}.norm", norm) for i, name in levels),
    *_sampling(r"encoder(\d+)/attention", f"{encoder}.attentions.0"),
    (r"encoder(\d+)/norm1", f"{encoder}.norms.0", norm),
    (r"encoder(\d+)/norm2", f"{encoder}.norms.1", norm),
    (r"encoder(\d+)/fc1", f"{encoder}.ffns.0.layers.0.0", dense),
    (r"encoder(\d+)/fc2", f"{encoder}.ffns.0.layers.1", dense),
    ("proposal", "transformer.enc_output", dense),
    ("proposal_norm", "transformer.enc_output_norm", norm),
    ("encoder_classifier", f"class_embed.{last}", _twice),
    (r"encoder_boxes/fc(\d)", rf"bbox_embed.{last}.layers.\1", _twice),
    (r"decoder(\d+)/self_attention/qkv", f"{decoder}.attentions.0.attn", torch_keys.stacked),
    (r"decoder(\d+)/self_attention/out", f"{decoder}.attentions.0.attn.out_proj", dense),
    (r"decoder(\d+)/self_norm", f"{decoder}.norms.0", norm),
    *_sampling(r"decoder(\d+)/cross_attention", f"{decoder}.attentions.1"),
    (r"decoder(\d+)/cross_norm", f"{decoder}.norms.1", norm),
    (r"decoder(\d+)/fc1", f"{decoder}.ffns.0.layers.0.0", dense),
    (r"decoder(\d+)/fc2", f"{decoder}.ffns.0.layers.1", dense),
    (r"decoder(\d+)/ffn_norm", f"{decoder}.norms.2", norm),
    ("decoder_norm", "transformer.decoder.norm", norm),
    (r"query_position(\d)", r"transformer.decoder.ref_point_head.layers.\1", dense),
    (r"classifier(\d+)", r"class_embed.\1", _repeated(head)),
    (r"boxes(\d+)/fc(\d)", r"bbox_embed.\1.layers.\2", _repeated(head)),
  ]


def _table(layout: str) -> Callable[[str, str], OfficialKey]:
  def factory(name: str, leaf: str) -> OfficialKey:
    del name
    if leaf not in _TABLES[layout]:
      raise torch_keys.no_such_variable("DINO", leaf)
    return torch_keys.same(_TABLES[layout][leaf])

  return factory


def _twice(name: str, leaf: str) -> OfficialKey:
  """A head's tensor, once below the decoder and once at the top."""
  key = torch_keys.dense(name, leaf)
  return dataclasses.replace(key, name=f"transformer.decoder.{key.name}", aliases=(key.name,))


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
