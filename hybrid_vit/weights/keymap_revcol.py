"""RevCol: names of the authors' PyTorch tensors (megvii-research/RevCol)."""

import functools
import re

import flax.linen as nn
import numpy as np

from hybrid_vit.weights import convert, torch_keys

_BLOCK = {"depthwise_conv": "dwconv", "norm": "norm", "expand": "pwconv1", "shrink": "pwconv2"}
_UP = {"up": "fusion.up.channel_reschedule", "deepest_up": "fusion.up2.channel_reschedule"}


def official_key(path: str, *, head: str, step_decoder: bool) -> convert.OfficialKey:
  """The authors' tensor for one of ours, such as "params/column1/level0/block0/norm/scale".

  Args:
    path: of our variable.
    head: the authors' name of the last classifier: "cls", or "cls_blocks.3" beside auxiliary ones.
    step_decoder: whether the decoders are of several steps; there, `projback` counts otherwise.

  Raises:
    ValueError: for a path that RevCol does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  if scope == "stem":
    if modules == ["norm"]:
      return torch_keys.norm("stem.1", leaf)
    return torch_keys.conv("stem.0", leaf)
  if scope == "head_norm":
    return torch_keys.norm(f"{head}.classifier.0", leaf)
  if scope == "head":
    return torch_keys.dense(f"{head}.classifier.1", leaf)
  match = re.fullmatch(r"(column|decoder|auxiliary_head)(\d+)", scope)
  if match and match[1] == "column":
    return _in_column(path, f"subnet{match[2]}", modules, leaf)
  if match and match[1] == "decoder":
    return _in_decoder(
      path, f"decoder_blocks.{match[2]}", modules[0], modules[1:], leaf, step_decoder
    )
  if match and modules == ["norm"]:
    return torch_keys.norm(f"cls_blocks.{match[2]}.classifier.0", leaf)
  if match and modules == ["dense"]:
    return torch_keys.dense(f"cls_blocks.{match[2]}.classifier.1", leaf)
  raise torch_keys.no_such_variable("RevCol", path)


def _in_column(path: str, prefix: str, modules: list[str], leaf: str) -> convert.OfficialKey:
  if not modules and leaf.startswith("alpha"):
    # One number a channel: (1, channels, 1, 1) there.
    name = f"{prefix}.{leaf}"
    return convert.OfficialKey(name, np.ravel, lambda x: x.reshape(1, -1, 1, 1))
  level, module, *inner = modules
  prefix = f"{prefix}.{level}"
  if module == "down_conv":
    return torch_keys.conv(f"{prefix}.fusion.down.0", leaf)
  if module == "down_norm":
    return torch_keys.norm(f"{prefix}.fusion.down.1", leaf)
  if module in _UP:
    if inner == ["norm"]:
      return torch_keys.norm(f"{prefix}.{_UP[module]}.1", leaf)
    return torch_keys.dense(f"{prefix}.{_UP[module]}.0", leaf)
  if module.startswith("block"):
    return _in_block(path, f"{prefix}.blocks.{module.removeprefix('block')}", inner[0], leaf)
  raise torch_keys.no_such_variable("RevCol", path)


def _in_decoder(
  path: str, prefix: str, module: str, inner: list[str], leaf: str, steps: bool
) -> convert.OfficialKey:
  if module == "to_pixels":
    return torch_keys.pointwise(f"{prefix}.projback.{0 if steps else 1}", leaf)
  if module == "norm":
    return torch_keys.norm(f"{prefix}.projback.0", leaf)
  match = re.fullmatch(r"(dense|norm|block)(\d)", module)
  if match and match[1] == "dense":
    return torch_keys.pointwise(f"{prefix}.proj_layers.{match[2]}.0", leaf)
  if match and match[1] == "norm":
    return torch_keys.norm(f"{prefix}.proj_layers.{match[2]}.1", leaf)
  if match:
    return _in_block(path, f"{prefix}.normal_layers.{match[2]}.0", inner[0], leaf)
  raise torch_keys.no_such_variable("RevCol", path)


def _in_block(path: str, prefix: str, module: str, leaf: str) -> convert.OfficialKey:
  if module == "layer_scale":
    return torch_keys.same(f"{prefix}.gamma")
  if module not in _BLOCK:
    raise torch_keys.no_such_variable("RevCol", path)
  name = f"{prefix}.{_BLOCK[module]}"
  if module == "norm":
    return torch_keys.norm(name, leaf)
  return (torch_keys.conv if module == "depthwise_conv" else torch_keys.dense)(name, leaf)


def _key_map(model: nn.Module) -> convert.KeyMap:
  arguments = vars(model)
  return functools.partial(
    official_key,
    head="cls_blocks.3" if arguments["intermediate_supervision"] else "cls",
    step_decoder=arguments["num_classes"] <= 1000,
  )


LAYOUTS = {"official": convert.Layout(_key_map)}
