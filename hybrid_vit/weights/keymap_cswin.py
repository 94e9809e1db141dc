"""CSWin: names of the authors' PyTorch tensors (microsoft/CSWin-Transformer)."""

import re

from hybrid_vit.weights import convert, torch_keys

_BLOCK = {
  "qkv": "qkv",
  "out": "proj",
  "norm1": "norm1",
  "norm2": "norm2",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
  "attention0/position_conv": "attns.0.get_v",
  "attention1/position_conv": "attns.1.get_v",
}


def official_key(path: str) -> convert.OfficialKey:
  """The authors' tensor for one of ours, such as "params/stage1_block0/qkv/kernel".

  Raises:
    ValueError: for a path that CSWin does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  module = "/".join(modules)
  if scope == "norm":
    return torch_keys.norm("norm", leaf)
  if output := re.fullmatch(r"stage(\d+)_norm", scope):
    # In the authors' segmentation code.
    return torch_keys.norm(f"norm{output[1]}", leaf)
  if scope == "head":
    return torch_keys.dense("head", leaf)
  if scope == "stem" and module == "conv":
    return torch_keys.conv("stage1_conv_embed.0", leaf)
  if scope == "stem" and module == "norm":
    return torch_keys.norm("stage1_conv_embed.2", leaf)
  if scope.startswith("merge") and module in ("conv", "norm"):
    factory = torch_keys.conv if module == "conv" else torch_keys.norm
    return factory(f"{scope}.{module}", leaf)
  block = torch_keys.block_of(scope)
  if block is None or module not in _BLOCK:
    raise torch_keys.no_such_variable("CSWin", path)
  name = f"stage{block[0]}.{block[1]}.{_BLOCK[module]}"
  if module.startswith("norm"):
    return torch_keys.norm(name, leaf)
  if module.endswith("position_conv"):
    return torch_keys.conv(name, leaf)
  return torch_keys.dense(name, leaf)


LAYOUTS = {"official": convert.Layout(lambda _: official_key)}
