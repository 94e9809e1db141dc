"""SMT: names in the authors' checkpoints, of classification and of detection."""

import re
from collections.abc import Iterable
from typing import Any

import flax.linen as nn

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import Layout, OfficialKey

_STEM = {
  "conv_0": ("conv.0", torch_keys.conv),
  "batch_norm": ("conv.1", torch_keys.norm),
  "conv_1": ("conv.3", torch_keys.conv),
  "norm": ("norm", torch_keys.norm),
}
_EMBEDDING = {"conv": ("proj", torch_keys.conv), "norm": ("norm", torch_keys.norm)}
_MODULATION = {"value": "v", "scales": "s", "out": "proj"}
_ATTENTION = {"query": "q", "key_value": "kv", "out": "proj"}


def official_key(path: str) -> OfficialKey:
  """The authors' tensor for one of our variables, such as "params/stage1_block0/norm1/scale".

  Raises:
    ValueError: for a path that SMT does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  if scope == "head":
    return torch_keys.dense("head", leaf)
  if norm := re.fullmatch(r"stage(\d+)_norm", scope):
    return torch_keys.norm(f"norm{norm[1]}", leaf)
  if scope == "stem" and "/".join(modules) in _STEM:
    name, kind = _STEM[modules[0]]
    return kind(f"patch_embed1.{name}", leaf)
  embedding = re.fullmatch(r"stage(\d+)_embedding", scope)
  if embedding and "/".join(modules) in _EMBEDDING:
    name, kind = _EMBEDDING[modules[0]]
    return kind(f"patch_embed{embedding[1]}.{name}", leaf)

  block = torch_keys.block_of(scope)
  if block is None or not modules:
    raise torch_keys.no_such_variable("SMT", path)
  prefix, module, inner = f"block{block[0]}.{block[1]}", modules[0], modules[-1]
  if module in ("norm1", "norm2"):
    return torch_keys.norm(f"{prefix}.{module}", leaf)
  if module in ("layer_scale1", "layer_scale2"):
    return torch_keys.same(f"{prefix}.gamma_{module[-1]}")
  if module == "mlp_conv":
    return torch_keys.conv(f"{prefix}.mlp.dwconv.dwconv", leaf)
  if module in ("mlp_fc1", "mlp_fc2"):
    return torch_keys.dense(f"{prefix}.mlp.{module[-3:]}", leaf)
  if module == "attention" and inner in _ATTENTION:
    return torch_keys.dense(f"{prefix}.attn.{_ATTENTION[inner]}", leaf)
  if module == "attention" and inner == "value_conv":
    return torch_keys.conv(f"{prefix}.attn.local_conv", leaf)
  if module == "modulation" and inner in _MODULATION:
    return torch_keys.dense(f"{prefix}.attn.{_MODULATION[inner]}", leaf)
  if module == "modulation" and inner == "batch_norm":
    return torch_keys.norm(f"{prefix}.attn.bn", leaf)
  if module == "modulation" and inner in ("expand", "shrink"):
    return torch_keys.pointwise(f"{prefix}.attn.proj{int(inner == 'shrink')}", leaf)
  if scale := re.fullmatch(r"modulation/scale_conv_(\d+)", "/".join(modules)):
    return torch_keys.conv(f"{prefix}.attn.local_conv_{int(scale[1]) + 1}", leaf)
  raise torch_keys.no_such_variable("SMT", path)


def arguments_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
  """The depth of the last stage by a checkpoint's names, where it is not the network's.

  The released SMT-S may have one block there, its configuration says two.

  Returns:
    {"depths": ...}, or {} where nothing differs or other stages do too: then it is another network.
  """
  found: dict[int, int] = {}
  for name in names:
    if match := re.match(r"block(\d+)\.(\d+)\.", name):
      stage, block = int(match[1]), int(match[2])
      found[stage] = max(found.get(stage, 0), block + 1)
  depths = tuple(found[stage] for stage in sorted(found))
  expected = tuple(getattr(model, "depths", ()))
  same = len(depths) == len(expected) and depths[:-1] == expected[:-1]
  return {"depths": depths} if same and depths != expected else {}


def _rename(name: str) -> str:
  # The detection code calls the values' convolution dw_conv, and puts the network below "backbone".
  name = re.sub(r"^(module\.)?(backbone\.)?", "", name)
  return name.replace(".attn.dw_conv.", ".attn.local_conv.")


LAYOUTS = {
  "official": Layout(
    lambda model: official_key,
    not_weights=torch_keys.BATCH_NORM_COUNTER,
    rename=_rename,
    arguments=arguments_of,
  )
}
