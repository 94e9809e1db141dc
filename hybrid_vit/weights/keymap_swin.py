"""Swin: names in the authors' PyTorch checkpoints (microsoft/Swin-Transformer), timm, transformers.

timm (since 0.9) counts a merging to the stage that begins with it, the other two to the stage
before. transformers has query, key and value apart. OpenMMLab's own Swin (mmsegmentation,
mmdetection, mmpretrain) merges 2x2 cells in the order of `unfold`, channel by channel.
"""

import dataclasses
import re

import numpy as np

from hybrid_vit.models.swin import Swin
from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

# Ours: the authors' and timm's, transformers', OpenMMLab's.
_AUTHORS, _HF, _MM = range(3)
_NORMS = {
  "norm1": ("norm1", "layernorm_before", "norm1"),
  "norm2": ("norm2", "layernorm_after", "norm2"),
}
_DENSE = {
  "attention/out": ("attn.proj", "attention.output.dense", "attn.w_msa.proj"),
  "fc1": ("mlp.fc1", "intermediate.dense", "ffn.layers.0.0"),
  "fc2": ("mlp.fc2", "output.dense", "ffn.layers.1"),
}
_TABLE = (
  "attn.relative_position_bias_table",
  "attention.self.relative_position_bias_table",
  "attn.w_msa.relative_position_bias_table",
)
_STEM = {
  "conv": (
    "patch_embed.proj",
    "swin.embeddings.patch_embeddings.projection",
    "patch_embed.projection",
  ),
  "norm": ("patch_embed.norm", "swin.embeddings.norm", "patch_embed.norm"),
}
_STAGES = ("layers", "swin.encoder.layers", "stages")
_HEAD_NORM = ("norm", "swin.layernorm", "norm3")

# Spellings of transformers 5 in memory; its files keep those of transformers 4.
_TRANSFORMERS_5 = (
  (r"\.attention\.([qkv])_proj\.", r".attention.self.\1."),
  (r"\.attention\.relative_position_bias\.", ".attention.self."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
  (r"\.mlp\.fc1\.", ".intermediate.dense."),
  (r"\.mlp\.fc2\.", ".output.dense."),
)
_LETTERS = {".self.q.": ".self.query.", ".self.k.": ".self.key.", ".self.v.": ".self.value."}


def _key_map(library: int, head: str, merging_offset: int, output_norms: str) -> KeyMap:
  """Of a layout.

  Args:
    library: which of the names counts.
    head: name of the classifier.
    merging_offset: our stage's number less theirs at the merging before it.
    output_norms: name of a norm beside the trunk, {0} for the stage from 0, {1} from 1; "" where
      the library has none.
  """

  def official(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, module, leaf = parts[0], "/".join(parts[1:-1]), parts[-1]
    if scope == "head_norm":
      return torch_keys.norm(_HEAD_NORM[library], leaf)
    if scope == "head":
      return torch_keys.dense(head, leaf)
    if scope == "stem" and module in _STEM:
      return (torch_keys.conv if module == "conv" else torch_keys.norm)(
        _STEM[module][library], leaf
      )
    if output := re.fullmatch(r"stage(\d+)_norm", scope):
      if not output_norms:
        raise torch_keys.no_such_variable("Swin", path)
      return torch_keys.norm(output_norms.format(int(output[1]) - 1, output[1]), leaf)
    merging = re.fullmatch(r"stage(\d+)_merging", scope)
    if merging and module in ("norm", "reduction"):
      name = f"{_STAGES[library]}.{int(merging[1]) - merging_offset}.downsample.{module}"
      key = (torch_keys.norm if module == "norm" else torch_keys.dense)(name, leaf)
      return _unfolded(key) if library == _MM else key
    block = torch_keys.block_of(scope)
    if not block:
      raise torch_keys.no_such_variable("Swin", path)
    prefix = f"{_STAGES[library]}.{block[0] - 1}.blocks.{block[1]}"
    if module in _NORMS:
      return torch_keys.norm(f"{prefix}.{_NORMS[module][library]}", leaf)
    if module in _DENSE:
      return torch_keys.dense(f"{prefix}.{_DENSE[module][library]}", leaf)
    if module == "attention" and leaf == "position_bias":
      return OfficialKey(f"{prefix}.{_TABLE[library]}", _table_to_ours, _table_to_theirs)
    if module != "attention/qkv":
      raise torch_keys.no_such_variable("Swin", path)
    if library != _HF:
      inner = "attn.qkv" if library == _AUTHORS else "attn.w_msa.qkv"
      return torch_keys.dense(f"{prefix}.{inner}", leaf)
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


def _unfolded(key: OfficialKey) -> OfficialKey:
  """A merging's leaf whose inputs lie by channel and then by cell (rows first) there.

  Here they lie by cell, columns first, and then by channel.
  """

  def to_ours(x: np.ndarray) -> np.ndarray:
    x = key.to_ours(x)
    cells = x.reshape(-1, 2, 2, *x.shape[1:])
    return np.moveaxis(cells, 0, 2).swapaxes(0, 1).reshape(x.shape)

  def to_theirs(x: np.ndarray) -> np.ndarray:
    cells = x.reshape(2, 2, -1, *x.shape[1:])
    return key.to_theirs(np.moveaxis(cells.swapaxes(0, 1), 2, 0).reshape(x.shape))

  return dataclasses.replace(key, to_ours=to_ours, to_theirs=to_theirs)


def _official(model: Swin) -> KeyMap:
  # Those of the authors' detection and segmentation code.
  return _key_map(_AUTHORS, "head", 2, "norm{0}")


def _timm(model: Swin) -> KeyMap:
  return _key_map(_AUTHORS, "head.fc", 1, "")


def _transformers(model: Swin) -> KeyMap:
  return _key_map(_HF, "classifier", 2, "hidden_states_norms.stage{1}")


def _openmmlab(model: Swin) -> KeyMap:
  return _key_map(_MM, "head.fc", 2, "norm{0}")


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
  "openmmlab": Layout(_openmmlab, not_weights=_NOT_WEIGHTS),
}
