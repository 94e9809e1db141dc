"""L2ViT: names in the author's PyTorch checkpoints (ChuanyangZheng/L2ViT).

The copies for detection and segmentation have "norm0" to "norm3" in place of "norm" and "head".
"""

import re

from hybrid_vit.models.l2vit import L2ViT
from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

# Inside a block.
_NORMS = {
  "attention_norm": "norm1",
  "mlp_norm": "norm2",
  "concentration_norm": "norm3",
  "concentration/norm": "local_mp.bn",
}
_DENSE = {
  "attention/qkv": "attn.qkv",
  "attention/out": "attn.proj",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
}
_CONVOLUTIONS = {
  "position_conv": "cpe.0.proj",
  "second_position_conv": "cpe.1.proj",
  "concentration/conv_0": "local_mp.conv1",
  "concentration/conv_1": "local_mp.conv2",
}


def _official_key(path: str) -> OfficialKey:
  parts = path.split("/")[1:]
  scope, module, leaf = parts[0], "/".join(parts[1:-1]), parts[-1]
  if scope == "head_norm":
    return torch_keys.norm("norm", leaf)
  if scope in ("head", "head_projection"):
    return torch_keys.dense("head" if scope == "head" else "last_proj", leaf)
  if scope == "stem":
    return _stem_key(path, module, leaf)
  beside = re.fullmatch(r"stage(\d+)_(norm|downsample)", scope)
  if beside:
    index = int(beside[1]) - 1
    if beside[2] == "norm":
      return torch_keys.norm(f"norm{index}", leaf)
    if module == "norm":
      return torch_keys.norm(f"downsample_layers.{index}.norm", leaf)
    return torch_keys.conv(f"downsample_layers.{index}.proj", leaf)
  block = torch_keys.block_of(scope)
  if not block:
    raise torch_keys.no_such_variable("L2ViT", path)
  prefix = f"stages.{block[0] - 1}.{block[1]}"
  if module == "attention" and leaf == "temperature":
    return torch_keys.same(f"{prefix}.attn.temperature")
  if module in _NORMS:
    return torch_keys.norm(f"{prefix}.{_NORMS[module]}", leaf)
  if module in _DENSE:
    return torch_keys.dense(f"{prefix}.{_DENSE[module]}", leaf)
  if module in _CONVOLUTIONS:
    return torch_keys.conv(f"{prefix}.{_CONVOLUTIONS[module]}", leaf)
  raise torch_keys.no_such_variable("L2ViT", path)


def _stem_key(path: str, module: str, leaf: str) -> OfficialKey:
  if module == "norm":
    return torch_keys.norm("downsample_layers.0.norm", leaf)
  if module == "conv":
    return torch_keys.conv("downsample_layers.0.proj", leaf)
  numbered = re.fullmatch(r"(conv|norm)_(\d+)", module)
  if not numbered:
    raise torch_keys.no_such_variable("L2ViT", path)
  # There a sequence of convolution, batch norm, ReLU, again and again.
  is_norm = numbered[1] == "norm"
  name = f"downsample_layers.0.proj.proj.{3 * int(numbered[2]) + is_norm}"
  return (torch_keys.norm if is_norm else torch_keys.conv)(name, leaf)


def _official(model: L2ViT) -> KeyMap:
  return _official_key


LAYOUTS = {"official": Layout(_official, not_weights=torch_keys.BATCH_NORM_COUNTER)}
