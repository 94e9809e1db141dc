"""Mask2Former: names of facebookresearch's tensors ("official") and of transformers'.

Paths below a whole model begin with "backbone" and "head"; a head alone has its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

_Rule = torch_keys.Rule

# Ours to theirs: parameters that belong to no layer.
_TABLES = {
  "official": {
    "query_features": "query_feat.weight",
    "query_positions": "query_embed.weight",
    "level_embedding": "level_embed.weight",
  },
  "transformers": {
    "query_features": "queries_features.weight",
    "query_positions": "queries_embedder.weight",
    "level_embedding": "level_embed.weight",
  },
}


def _apart(name: str, leaf: str) -> OfficialKey:
  return torch_keys.fused(torch_keys.dense, leaf, *(f"{name}.{letter}_proj" for letter in "qkv"))


def _plain(name: str, leaf: str) -> OfficialKey:
  del leaf
  return torch_keys.same(name)


def _sampling(replacement: str) -> list[_Rule]:
  """A `DeformableAttention` of the pixel decoder."""
  names = {
    "offsets": "sampling_offsets",
    "weights": "attention_weights",
    "value": "value_proj",
    "out": "output_proj",
  }
  return [
    (rf"pixel_decoder/encoder(\d+)/attention/{ours}", f"{replacement}.{theirs}", torch_keys.dense)
    for ours, theirs in names.items()
  ]


def _tables(layout: str, place: str) -> list[_Rule]:
  def table(name: str, leaf: str) -> OfficialKey:
    if leaf not in _TABLES[layout]:
      raise torch_keys.no_such_variable("Mask2Former", leaf)
    return torch_keys.same(name + _TABLES[layout][leaf])

  return [("", place, table)]


def _official() -> list[_Rule]:
  pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
  layer = rf"{pixels}.transformer.encoder.layers.\1"
  cross = rf"{predictor}.transformer_cross_attention_layers.\1"
  own = rf"{predictor}.transformer_self_attention_layers.\1"
  forward = rf"{predictor}.transformer_ffn_layers.\1"
  return [
    *_tables("official", f"{predictor}."),
    ("pixel_decoder", f"{pixels}.transformer.level_embed", _plain),
    (r"pixel_decoder/projection(\d+)", rf"{pixels}.input_proj.\1.0", torch_keys.conv),
    (r"pixel_decoder/projection(\d+)_norm", rf"{pixels}.input_proj.\1.1", torch_keys.norm),
    *_sampling(f"{layer}.self_attn"),
    (r"pixel_decoder/encoder(\d+)/(norm[12])", rf"{layer}.\2", torch_keys.norm),
    (r"pixel_decoder/encoder(\d+)/fc([12])", rf"{layer}.linear\2", torch_keys.dense),
    ("pixel_decoder/lateral", f"{pixels}.adapter_1", torch_keys.conv),
    ("pixel_decoder/lateral_norm", f"{pixels}.adapter_1.norm", torch_keys.norm),
    ("pixel_decoder/fusion", f"{pixels}.layer_1", torch_keys.conv),
    ("pixel_decoder/fusion_norm", f"{pixels}.layer_1.norm", torch_keys.norm),
    ("pixel_decoder/mask_features", f"{pixels}.mask_features", torch_keys.conv),
    (r"decoder(\d+)/cross_attention/qkv", f"{cross}.multihead_attn", torch_keys.stacked),
    (r"decoder(\d+)/cross_attention/out", f"{cross}.multihead_attn.out_proj", torch_keys.dense),
    (r"decoder(\d+)/cross_norm", f"{cross}.norm", torch_keys.norm),
    (r"decoder(\d+)/self_attention/qkv", f"{own}.self_attn", torch_keys.stacked),
    (r"decoder(\d+)/self_attention/out", f"{own}.self_attn.out_proj", torch_keys.dense),
    (r"decoder(\d+)/self_norm", f"{own}.norm", torch_keys.norm),
    (r"decoder(\d+)/fc([12])", rf"{forward}.linear\2", torch_keys.dense),
    (r"decoder(\d+)/ffn_norm", f"{forward}.norm", torch_keys.norm),
    ("predictor/norm", f"{predictor}.decoder_norm", torch_keys.norm),
    ("predictor/classifier", f"{predictor}.class_embed", torch_keys.dense),
    (r"predictor/embedding(\d+)", rf"{predictor}.mask_embed.layers.\1", torch_keys.dense),
  ]


def _transformers() -> list[_Rule]:
  pixels, module = "model.pixel_level_module.decoder", "model.transformer_module"
  encoder, decoder = rf"{pixels}.encoder.layers.\1", rf"{module}.decoder.layers.\1"
  return [
    *_tables("transformers", f"{module}."),
    ("pixel_decoder", f"{pixels}.level_embed", _plain),
    (r"pixel_decoder/projection(\d+)", rf"{pixels}.input_projections.\1.0", torch_keys.conv),
    (r"pixel_decoder/projection(\d+)_norm", rf"{pixels}.input_projections.\1.1", torch_keys.norm),
    *_sampling(f"{encoder}.self_attn"),
    (r"pixel_decoder/encoder(\d+)/norm1", f"{encoder}.self_attn_layer_norm", torch_keys.norm),
    (r"pixel_decoder/encoder(\d+)/norm2", f"{encoder}.final_layer_norm", torch_keys.norm),
    (r"pixel_decoder/encoder(\d+)/(fc[12])", rf"{encoder}.\2", torch_keys.dense),
    ("pixel_decoder/lateral", f"{pixels}.adapter_1.0", torch_keys.conv),
    ("pixel_decoder/lateral_norm", f"{pixels}.adapter_1.1", torch_keys.norm),
    ("pixel_decoder/fusion", f"{pixels}.layer_1.0", torch_keys.conv),
    ("pixel_decoder/fusion_norm", f"{pixels}.layer_1.1", torch_keys.norm),
    ("pixel_decoder/mask_features", f"{pixels}.mask_projection", torch_keys.conv),
    (r"decoder(\d+)/cross_attention/qkv", f"{decoder}.cross_attn", torch_keys.stacked),
    (r"decoder(\d+)/cross_attention/out", f"{decoder}.cross_attn.out_proj", torch_keys.dense),
    (r"decoder(\d+)/cross_norm", f"{decoder}.cross_attn_layer_norm", torch_keys.norm),
    (r"decoder(\d+)/self_attention/qkv", f"{decoder}.self_attn", _apart),
    (r"decoder(\d+)/self_attention/out", f"{decoder}.self_attn.out_proj", torch_keys.dense),
    (r"decoder(\d+)/self_norm", f"{decoder}.self_attn_layer_norm", torch_keys.norm),
    (r"decoder(\d+)/(fc[12])", rf"{decoder}.\2", torch_keys.dense),
    (r"decoder(\d+)/ffn_norm", f"{decoder}.final_layer_norm", torch_keys.norm),
    ("predictor/norm", f"{module}.decoder.layernorm", torch_keys.norm),
    ("predictor/classifier", "class_predictor", torch_keys.dense),
    (
      r"predictor/embedding(\d+)",
      rf"{module}.decoder.mask_predictor.mask_embedder.\1.0",
      torch_keys.dense,
    ),
  ]


HEAD_RULES: Mapping[str, list[_Rule]] = {"official": _official(), "transformers": _transformers()}

# Where the backbone's own names stand in a checkpoint.
_BACKBONE = {"official": "backbone.", "transformers": "model.pixel_level_module.encoder."}

# The loss's class weights, and the norm and classifier of a backbone that nothing reads.
_NOT_WEIGHTS = {
  "official": r"^criterion\.empty_weight$|^pixel_(mean|std)$",
  "transformers": (
    r"^criterion\.empty_weight$|^model\.pixel_level_module\.encoder\.(swin\.)?layernorm\."
  ),
}


def head_key_map(layout: str) -> KeyMap:
  """The key map of a head alone, from "params/query_features" on, with the checkpoint's names.

  Args:
    layout: "official" or "transformers".
  """

  def key_map(path: str) -> OfficialKey:
    return torch_keys.by_rules(HEAD_RULES[layout], path.partition("/")[2], "Mask2Former")

  return key_map


def mask2former_layouts(backbone: Any, backbone_layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Layouts of whole checkpoints, by the names of those of the backbone.

  The variables are {"params": {"backbone": …, "head": …}, …}.

  Args:
    backbone: the network below the head.
    backbone_layouts: of its family; "official" are the names of its authors' detection code.
  """
  found = {}
  for layout, prefix in _BACKBONE.items():
    if layout not in backbone_layouts:
      continue
    inner = backbone_layouts[layout]
    found[layout] = Layout(
      key_map=functools.partial(_whole_of, head_key_map(layout), inner.key_map(backbone), prefix),
      not_weights=rf"(?:{_NOT_WEIGHTS[layout]})|(?:{inner.not_weights})",
      rename=functools.partial(_RENAMES[layout], prefix, inner.rename),
    )
  return found


def _whole_of(head: KeyMap, backbone: KeyMap, prefix: str, model: Any) -> KeyMap:
  del model  # the parts are taken from it already
  return torch_keys.with_backbone(head, backbone, prefix, "Mask2Former")


def _official_spelling(prefix: str, inner: Callable[[str], str], name: str) -> str:
  # Files of before the paper's final version.
  name = name.replace("sem_seg_head.predictor.static_query.", "sem_seg_head.predictor.query_feat.")
  return torch_keys.renamed_below(prefix, inner, name)


def _transformers_spelling(prefix: str, inner: Callable[[str], str], name: str) -> str:
  if not name.startswith(prefix):
    return name
  # transformers 4 wrote the backbone's parts without the network's own name.
  below = re.sub(r"^(embeddings|encoder|layernorm)\.", r"swin.\1.", name.removeprefix(prefix))
  return prefix + inner(below)


_RENAMES = {"official": _official_spelling, "transformers": _transformers_spelling}
