"""ViT, DeiT and CLIP's image towers: names in the authors' checkpoints, timm's and transformers'.

"official" is facebookresearch/deit for the plain networks (timm's names), open_clip for the network
with a norm before its blocks, and apple/ml-mobileclip for the one with the convolutional stem. timm
puts a bias of zeros beside CLIP's projection: give `head_bias=True` to import it; without one, the
zeros are written on export.

detectron2's ViTDet keeps a row of positions for a class token that it has not: ours has none, and a
row of zeros is written.
"""

import dataclasses
import re

import numpy as np

from hybrid_vit.models import positions
from hybrid_vit.models.vit import VisionTransformer
from hybrid_vit.models.vitdet import RELATIVE_TABLES
from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey


@dataclasses.dataclass(frozen=True)
class BlockNames:
  """What one library calls the layers of `EncoderBlock`, below the block's own name.

  Attributes:
    attention_norm: the norm before attention.
    qkv: the fused projection, or query's, key's and value's.
    proj: the projection after attention.
    mlp_norm: the norm before the MLP.
    fc1: its first layer.
    fc2: its second layer.
    relative: tables of relative positions, of rows and columns, where the library has them.
  """

  attention_norm: str
  qkv: tuple[str, ...]
  proj: str
  mlp_norm: str
  fc1: str
  fc2: str
  relative: tuple[str, str] = ("", "")

  def key(self, prefix: str, module: str, leaf: str) -> OfficialKey:
    """The tensor of one of our variables below the block `prefix`."""
    if module == "qkv":
      if self.qkv[0].endswith("in_proj"):  # torch's own attention: in_proj_weight
        name = f"{prefix}.{self.qkv[0]}"
        return dataclasses.replace(
          torch_keys.dense(name, leaf),
          name=f"{name}_weight" if leaf == "kernel" else f"{name}_bias",
        )
      return torch_keys.fused(torch_keys.dense, leaf, *(f"{prefix}.{n}" for n in self.qkv))
    factory = torch_keys.norm if module.endswith("norm") else torch_keys.dense
    return factory(f"{prefix}.{getattr(self, module)}", leaf)


MOBILECLIP_BLOCK = BlockNames(
  "pre_norm_mha.0",
  ("pre_norm_mha.1.qkv_proj",),
  "pre_norm_mha.1.out_proj",
  "pre_norm_ffn.0",
  "pre_norm_ffn.1",
  "pre_norm_ffn.4",
)
OPEN_CLIP_BLOCK = BlockNames(
  "ln_1", ("attn.in_proj",), "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"
)
TRANSFORMERS_CLIP_BLOCK = BlockNames(
  "layer_norm1",
  ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "self_attn.out_proj",
  "layer_norm2",
  "mlp.fc1",
  "mlp.fc2",
)
_TIMM_BLOCK = BlockNames(
  "norm1",
  ("attn.qkv",),
  "attn.proj",
  "norm2",
  "mlp.fc1",
  "mlp.fc2",
  ("attn.rel_pos_h", "attn.rel_pos_w"),
)
_TRANSFORMERS_BLOCK = BlockNames(
  "layernorm_before",
  ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
  "attention.output.dense",
  "layernorm_after",
  "intermediate.dense",
  "output.dense",
)


@dataclasses.dataclass(frozen=True)
class _Names:
  """What one library calls a whole network.

  `conv` and `norm` are of the convolutional stem's layer {}; `head` is a linear layer, or with
  `bare_head` a matrix (in, out). `leading` is the number of leading ones in the shapes of the class
  token and of the positions, `distillation` names the distillation token and its head.
  """

  block: str
  blocks: BlockNames
  stem: str
  class_token: str
  positions: str
  pre_norm: str
  head_norm: str
  head: str
  bare_head: bool = False
  leading: tuple[int, int] = (2, 1)
  norm: str = ""
  distillation: tuple[str, ...] = ()


_TIMM = _Names(
  "blocks.{}",
  _TIMM_BLOCK,
  "patch_embed.proj",
  "cls_token",
  "pos_embed",
  "norm_pre",
  "norm",
  "head",
  distillation=("dist_token", "head_dist"),
)
_MOBILECLIP = _Names(
  "transformer.{}",
  MOBILECLIP_BLOCK,
  "patch_emb.{}.block.conv",
  "cls_token",
  "pos_embed.pos_embed.pos_embed",
  "",
  "post_transformer_norm",
  "classifier.proj",
  bare_head=True,
  leading=(2, 2),
  norm="patch_emb.{}.block.norm",
)
_OPEN_CLIP = _Names(
  "visual.transformer.resblocks.{}",
  OPEN_CLIP_BLOCK,
  "visual.conv1",
  "visual.class_embedding",
  "visual.positional_embedding",
  "visual.ln_pre",
  "visual.ln_post",
  "visual.proj",
  bare_head=True,
  leading=(0, 0),
)
_TRANSFORMERS = _Names(
  "vit.encoder.layer.{}",
  _TRANSFORMERS_BLOCK,
  "vit.embeddings.patch_embeddings.projection",
  "vit.embeddings.cls_token",
  "vit.embeddings.position_embeddings",
  "",
  "vit.layernorm",
  "classifier",
)
_TRANSFORMERS_DISTILLED = _Names(
  "deit.encoder.layer.{}",
  _TRANSFORMERS_BLOCK,
  "deit.embeddings.patch_embeddings.projection",
  "deit.embeddings.cls_token",
  "deit.embeddings.position_embeddings",
  "",
  "deit.layernorm",
  "cls_classifier",
  distillation=("deit.embeddings.distillation_token", "distillation_classifier"),
)
_TRANSFORMERS_CLIP = _Names(
  "vision_model.encoder.layers.{}",
  TRANSFORMERS_CLIP_BLOCK,
  "vision_model.embeddings.patch_embedding",
  "vision_model.embeddings.class_embedding",
  "vision_model.embeddings.position_embedding.weight",
  "vision_model.pre_layrnorm",  # their spelling
  "vision_model.post_layernorm",
  "visual_projection",
  leading=(0, 0),
)


def _key_map(model: VisionTransformer, names: _Names) -> KeyMap:
  def key_map(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, modules, leaf = parts[0], parts[1:-1], parts[-1]
    block = torch_keys.block_of(scope)
    if block and leaf in RELATIVE_TABLES and names.blocks.relative[0]:
      table = names.blocks.relative[RELATIVE_TABLES.index(leaf)]
      return torch_keys.same(f"{names.block.format(block[1])}.{table}")
    if block and modules:
      return names.blocks.key(names.block.format(block[1]), modules[0], leaf)
    if path == "params/distillation_token" and names.distillation:
      return with_leading_ones(names.distillation[0], names.leading[0], 0)
    if scope == "distillation_head" and names.distillation:
      return torch_keys.dense(names.distillation[1], leaf)
    if path == "params/class_token":
      return with_leading_ones(names.class_token, names.leading[0], 0)
    if path == "params/position_embedding" and (model.window_size or model.relative_size):
      return _after_class_token(names.positions, names.leading[1], model)
    if path in ("params/position_embedding", "params/position_sequence"):
      return with_leading_ones(names.positions, names.leading[1], 1)
    if scope == "stem" and modules:
      kind, layer = modules[0].split("_")
      name = names.stem if kind == "conv" else names.norm
      return (torch_keys.conv if kind == "conv" else torch_keys.norm)(name.format(layer), leaf)
    if scope == "stem":
      return torch_keys.conv(names.stem, leaf)
    if scope in ("pre_norm", "head_norm"):
      return torch_keys.norm(getattr(names, scope), leaf)
    if scope == "head" and names.bare_head and not model.head_bias:
      return torch_keys.same(names.head)
    if scope == "head":
      return torch_keys.dense(names.head.removesuffix(".proj"), leaf)
    raise torch_keys.no_such_variable("VisionTransformer", path)

  return key_map


def with_leading_ones(name: str, leading: int, kept: int) -> OfficialKey:
  """A tensor with `leading` axes of length 1 before its `kept` + 1 own ones."""

  def to_ours(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[x.ndim - kept - 1 :])

  return OfficialKey(name, to_ours, lambda x: x.reshape((1,) * leading + x.shape))


def _after_class_token(name: str, leading: int, model: VisionTransformer) -> OfficialKey:
  """Positions that have a row before those of the patches there, where there is no such token."""
  key = with_leading_ones(name, leading, 1)
  rows, columns = positions.pair(model.position_size)

  def to_ours(x: np.ndarray) -> np.ndarray:
    table = key.to_ours(x)
    return table[1:] if len(table) == rows * columns + 1 else table

  def to_theirs(x: np.ndarray) -> np.ndarray:
    return key.to_theirs(np.concatenate([np.zeros_like(x[:1]), x]))

  return OfficialKey(name, to_ours, to_theirs)


def _official(model: VisionTransformer) -> KeyMap:
  if model.stem == "convolutions":
    return _key_map(model, _MOBILECLIP)
  return _key_map(model, _OPEN_CLIP if model.pre_norm else _TIMM)


def _timm(model: VisionTransformer) -> KeyMap:
  names = _TIMM
  if model.stem == "convolutions":
    stem, norm = "patch_embed.backbone.{}.conv", "patch_embed.backbone.{}.bn"
    names = dataclasses.replace(names, stem=stem, norm=norm)
  if model.pool_before_norm:
    names = dataclasses.replace(names, head_norm="fc_norm")
  return _key_map(model, names)


def _transformers(model: VisionTransformer) -> KeyMap:
  if model.stem == "convolutions" or model.pool_before_norm:
    raise ValueError("transformers has no such VisionTransformer")
  if model.distillation_token:
    return _key_map(model, _TRANSFORMERS_DISTILLED)
  return _key_map(model, _TRANSFORMERS_CLIP if model.pre_norm else _TRANSFORMERS)


def _zero_bias(model: VisionTransformer) -> dict[str, np.ndarray]:
  if model.head_bias or not model.num_classes:
    return {}
  return {"head.bias": np.zeros((model.num_classes,), np.float32)}


_NEWER: tuple[tuple[str, str], ...] = (
  (r"^(vit|deit)\.layers\.", r"\1.encoder.layer."),
  (r"\.attention\.q_proj\.", ".attention.attention.query."),
  (r"\.attention\.k_proj\.", ".attention.attention.key."),
  (r"\.attention\.v_proj\.", ".attention.attention.value."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
  (r"^((?:vit|deit)\..*)\.mlp\.fc1\.", r"\1.intermediate.dense."),
  (r"^((?:vit|deit)\..*)\.mlp\.fc2\.", r"\1.output.dense."),
)


def _older_spelling(name: str) -> str:
  """transformers 5 renamed ViT's and DeiT's layers; files keep the names of version 4."""
  for pattern, there in _NEWER:
    name = re.sub(pattern, there, name)
  return name


# A file of a whole CLIP holds the text tower, its projection and the scale too.
LAYOUTS = {
  "official": Layout(
    _official,
    not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|^logit_scale$|^text_encoder\.|"
    r"^transformer\.resblocks\.|^(positional_embedding|text_projection)$|^(token_embedding|ln_final)\.",
    rename=lambda name: name.removeprefix("image_encoder.model."),
  ),
  "timm": Layout(
    _timm,
    not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|^logit_scale$|^text\.",
    rename=lambda name: name.removeprefix("visual.trunk."),
    constants=_zero_bias,
  ),
  "transformers": Layout(
    _transformers,
    not_weights=r"^logit_scale$|^text_model\.|^text_projection\.|\.position_ids$",
    rename=_older_spelling,
  ),
}
