"""Swin: names in the authors' PyTorch checkpoints (microsoft/Swin-Transformer), timm, transformers.

timm (since 0.9) counts a merging to the stage that begins with it, the other two to the stage
before. transformers has query, key and value apart.
"""

import re

import numpy as np

from hybrid_vit.models.swin import Swin
from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

# Ours: the authors' and timm's, transformers'.
_NORMS = {
  "norm1": ("norm1", "layernorm_before"),
  "norm2": ("norm2", "layernorm_after"),
}
_DENSE = {
  "attention/out": ("attn.proj", "attention.output.dense"),
  "fc1": ("mlp.fc1", "intermediate.dense"),
  "fc2": ("mlp.fc2", "output.dense"),
}
_TABLE = ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table")
_STEM = {
  "conv": ("patch_embed.proj", "swin.embeddings.patch_embeddings.projection"),
  "norm": ("patch_embed.norm", "swin.embeddings.norm"),
}
_STAGES = ("layers", "swin.encoder.layers")
_HEAD_NORM = ("norm", "swin.layernorm")

# Spellings of transformers 5 in memory; its files keep those of transformers 4.
_TRANSFORMERS_5 = (
  (r"\.attention\.([qkv])_proj\.", r".attention.self.\1."),
  (r"\.attention\.relative_position_bias\.", ".attention.self."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
  (r"\.mlp\.fc1\.", ".intermediate.dense."),
  (r"\.mlp\.fc2\.", ".output.dense."),
)
_LETTERS = {".self.q.": ".self.query.", ".self.k.": ".self.key.", ".self.v.": ".self.value."}


def _key_map(transformers: bool, head: str, merging_offset: int, output_norms: str) -> KeyMap:
  """Of a layout.

  Args:
    transformers: whether the second of two names counts.
    head: name of the classifier.
    merging_offset: our stage's number less theirs at the merging before it.
    output_norms: name of a norm beside the trunk, {0} for the stage from 0, {1} from 1; "" where
      the library has none.
  """

  def official(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, module, leaf = parts[0], "/".join(parts[1:-1]), parts[-1]
    if scope == "head_norm":
      return torch_keys.norm(_HEAD_NORM[transformers], leaf)
    if scope == "head":
      return torch_keys.dense(head, leaf)
    if scope == "stem" and module in _STEM:
      return (torch_keys.conv if module == "conv" else torch_keys.norm)(
        _STEM[module][transformers], leaf
      )
    if output := re.fullmatch(r"stage(\d+)_norm", scope):
      if not output_norms:
        raise torch_keys.no_such_variable("Swin", path)
      return torch_keys.norm(output_norms.format(int(output[1]) - 1, output[1]), leaf)
    merging = re.fullmatch(r"stage(\d+)_merging", scope)
    if merging and module in ("norm", "reduction"):
      name = f"{_STAGES[transformers]}.{int(merging[1]) - merging_offset}.downsample.{module}"
      return (torch_keys.norm if module == "norm" else torch_keys.dense)(name, leaf)
    block = torch_keys.block_of(scope)
    if not block:
      raise torch_keys.no_such_variable("Swin", path)
    prefix = f"{_STAGES[transformers]}.{block[0] - 1}.blocks.{block[1]}"
    if module in _NORMS:
      return torch_keys.norm(f"{prefix}.{_NORMS[module][transformers]}", leaf)
    if module in _DENSE:
      return torch_keys.dense(f"{prefix}.{_DENSE[module][transformers]}", leaf)
    if module == "attention" and leaf == "position_bias":
      return OfficialKey(f"{prefix}.{_TABLE[transformers]}", _table_to_ours, _table_to_theirs)
    if module != "attention/qkv":
      raise torch_keys.no_such_variable("Swin", path)
    if not transformers:
      return torch_keys.dense(f"{prefix}.attn.qkv", leaf)
    key = torch_keys.dense(f"{prefix}.attention.self.query", leaf)
    further = tuple(key.name.replace(".query.", f".{n}.") for n in ("key", "value"))
    return OfficialKey(key.name, key.to_ours, key.to_theirs, further)

  return official


def _table_to_ours(x: np.ndarray) -> np.ndarray:
  """(positions, heads), query less key, to `[heads, rows, columns]`, key less query."""
  side = round(x.shape[0] ** 0.5)
  return x.reshape(side, side, -1).transpose(2, 0, 1)[:, ::-1, ::-1]


def _table_to_theirs(x: np.ndarray) -> np.ndarray:
  return x[:, ::-1, ::-1].transpose(1, 2, 0).reshape(-1, x.shape[0])


def _official(model: Swin) -> KeyMap:
  # Those of the authors' detection and segmentation code.
  return _key_map(False, "head", 2, "norm{0}")


def _timm(model: Swin) -> KeyMap:
  return _key_map(False, "head.fc", 1, "")


def _transformers(model: Swin) -> KeyMap:
  return _key_map(True, "classifier", 2, "hidden_states_norms.stage{1}")


def _spell_as_transformers_4(name: str) -> str:
  for pattern, replacement in _TRANSFORMERS_5:
    name = re.sub(pattern, replacement, name)
  for short, long in _LETTERS.items():
    name = name.replace(short, long)
  return name


_NOT_WEIGHTS = r"(relative_position_index|attn_mask)$"

LAYOUTS = {
  "official": Layout(_official, not_weights=_NOT_WEIGHTS),
  "timm": Layout(_timm, not_weights=_NOT_WEIGHTS),
  "transformers": Layout(_transformers, not_weights=_NOT_WEIGHTS, rename=_spell_as_transformers_4),
}
