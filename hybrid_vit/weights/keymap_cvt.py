"""CvT: names in the authors' PyTorch checkpoints (microsoft/CvT) and in those of transformers.

The numbers are the same in both; the transformers code itself answers otherwise under them, by
about 2 % of the output's scale, since it has the exact GELU where the authors have QuickGELU.
"""

import re

from hybrid_vit.models.cvt import CvT
from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

# Inside a block: ours, the authors', transformers'.
_NORMS = {
  "norm1": ("norm1", "layernorm_before"),
  "norm2": ("norm2", "layernorm_after"),
}
_DENSE = {
  "attention/query": ("attn.proj_q", "attention.attention.projection_query"),
  "attention/key": ("attn.proj_k", "attention.attention.projection_key"),
  "attention/value": ("attn.proj_v", "attention.attention.projection_value"),
  "attention/out": ("attn.proj", "attention.output.dense"),
  "fc1": ("mlp.fc1", "intermediate.dense"),
  "fc2": ("mlp.fc2", "output.dense"),
}
_OUTER = {"head_norm": ("norm", "layernorm"), "head": ("head", "classifier")}


def _key_map(layout: int) -> KeyMap:
  """Layout 0: the authors'. 1: transformers'."""
  stage_name = ("stage{}", "cvt.encoder.stages.{}")[layout]
  embed = (
    {"conv": "patch_embed.proj", "norm": "patch_embed.norm"},
    {
      "conv": "embedding.convolution_embeddings.projection",
      "norm": "embedding.convolution_embeddings.normalization",
    },
  )[layout]
  blocks = ("blocks", "layers")[layout]

  def official(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, module, leaf = parts[0], "/".join(parts[1:-1]), parts[-1]
    if scope == "head_norm":
      return torch_keys.norm(_OUTER[scope][layout], leaf)
    if scope == "head":
      return torch_keys.dense(_OUTER[scope][layout], leaf)
    embedding = re.fullmatch(r"stage(\d+)_embed", scope)
    if scope == "stem" or embedding:
      stage = stage_name.format(int(embedding[1]) - 1 if embedding else 0)
      if leaf == "class_token":
        return torch_keys.same(f"{stage}.cls_token")
      if module not in embed:
        raise torch_keys.no_such_variable("CvT", path)
      name = f"{stage}.{embed[module]}"
      return (torch_keys.conv if module == "conv" else torch_keys.norm)(name, leaf)
    block = torch_keys.block_of(scope)
    if not block:
      raise torch_keys.no_such_variable("CvT", path)
    prefix = f"{stage_name.format(block[0] - 1)}.{blocks}.{block[1]}"
    if module in _NORMS:
      return torch_keys.norm(f"{prefix}.{_NORMS[module][layout]}", leaf)
    if module in _DENSE:
      return torch_keys.dense(f"{prefix}.{_DENSE[module][layout]}", leaf)
    projection = re.fullmatch(r"attention/(query|key|value)_(conv|norm)", module)
    if not projection:
      raise torch_keys.no_such_variable("CvT", path)
    which, kind = projection.groups()
    if layout == 0:
      name = f"{prefix}.attn.conv_proj_{which[0]}.{'conv' if kind == 'conv' else 'bn'}"
    else:
      part = "convolution" if kind == "conv" else "normalization"
      name = f"{prefix}.attention.attention.convolution_projection_{which}"
      name = f"{name}.convolution_projection.{part}"
    return (torch_keys.conv if kind == "conv" else torch_keys.norm)(name, leaf)

  return official


def _official(model: CvT) -> KeyMap:
  return _key_map(0)


def _transformers(model: CvT) -> KeyMap:
  return _key_map(1)


def _with_prefix(name: str) -> str:
  # A bare CvtModel is written without the classifier's prefix.
  return f"cvt.{name}" if name.startswith("encoder.") else name


LAYOUTS = {
  "official": Layout(_official, not_weights=torch_keys.BATCH_NORM_COUNTER),
  "transformers": Layout(
    _transformers, not_weights=torch_keys.BATCH_NORM_COUNTER, rename=_with_prefix
  ),
}
