"""MCi: names of the authors' tensors (apple/ml-mobileclip, `mobileclip/models/mci.py`) and timm's.

Both the network of training and the merged one have names in both. timm's copy (`fastvit_mci0`, …;
OpenCLIP's MobileCLIP-S1 and S2 hold it as `visual.trunk`) puts a bias of zeros beside the
projection: give `head_bias=True` to import it; without one, the zeros are written on export.
"""

from collections.abc import Iterable

import numpy as np

from hybrid_vit.models.mci import MCi
from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

# Our names of a block of branches to the authors' and timm's.
_BRANCHES = {
  "official": {
    "conv_branch": "rbr_conv.0",
    "scale_branch": "rbr_scale",
    "skip_norm": "rbr_skip",
    "large_branch": "lkb_origin",
    "small_branch": "small_conv",
    "mlp": "convffn",
    "position_conv": "pe",
    "layer_scale": "layer_scale",
  },
  "timm": {
    "conv_branch": "conv_kxk.0",
    "scale_branch": "conv_scale",
    "skip_norm": "identity",
    "large_branch": "large_conv",
    "small_branch": "small_conv",
    "mlp": "mlp",
    "position_conv": "pos_enc",
    "layer_scale": "layer_scale.gamma",
  },
}


def official_key_map(model: MCi) -> KeyMap:
  """The authors' names: stages, steps and position convolutions are one list, `network`."""
  places, place = {}, 0
  for stage in range(len(model.depths)):
    for kind, there in (
      ("downsample", model.has_downsample(stage)),
      ("position", model.position_kernel_sizes[stage] is not None),
      ("blocks", True),
    ):
      if there:
        places[kind, stage + 1] = f"network.{place}"
        place += 1

  def key_map(path: str) -> OfficialKey:
    scope, *modules, leaf = path.split("/")[1:]
    if scope == "head":
      # A bare matrix in CLIP's projection, (in, out); a linear layer for classes.
      if not model.head_bias:
        return torch_keys.same("head.proj")
      return torch_keys.dense("head", leaf)
    if scope == "head_conv":
      return repmixer_key("official", "conv_exp", modules, leaf)
    if scope == "stem":
      return repmixer_key("official", f"patch_embed.{modules[0][-1]}", modules[1:], leaf)
    block = torch_keys.block_of(scope)
    if block:
      prefix = f"{places['blocks', block[0]]}.{block[1]}"
      return repmixer_key("official", prefix, modules, leaf)
    stage, kind = int(scope[len("stage")]), scope.split("_")[1]
    if (kind, stage) not in places:
      raise torch_keys.no_such_variable("MCi", path)
    if kind == "downsample":
      prefix, modules, name = _downsample(f"{places[kind, stage]}.proj", modules)
      if modules[0] == "reparam_conv" and name == "large":
        return torch_keys.conv(f"{prefix}.lkb_reparam", leaf)
      if modules[0] == "se":
        layer = {"reduce": "fc1", "expand": "fc2"}[modules[1]]
        return torch_keys.pointwise(f"{prefix}.se.{layer}", leaf)
      return repmixer_key("official", prefix, modules, leaf)
    return repmixer_key("official", places[kind, stage], modules, leaf)

  return key_map


def timm_key_map(model: MCi) -> KeyMap:
  """timm's names: each stage holds its step and its position convolution."""

  def key_map(path: str) -> OfficialKey:
    scope, *modules, leaf = path.split("/")[1:]
    if scope == "head":
      return torch_keys.dense("head.fc", leaf)
    if scope == "head_conv":
      return repmixer_key("timm", "final_conv", modules, leaf)
    if scope == "stem":
      return repmixer_key("timm", f"stem.{modules[0][-1]}", modules[1:], leaf)
    block = torch_keys.block_of(scope)
    if block:
      return repmixer_key("timm", f"stages.{block[0] - 1}.blocks.{block[1]}", modules, leaf)
    stage, kind = int(scope[len("stage")]) - 1, scope.split("_")[1]
    if kind == "downsample":
      prefix, modules, _ = _downsample(f"stages.{stage}.downsample.proj", modules)
      return repmixer_key("timm", prefix, modules, leaf)
    if kind == "position":
      return repmixer_key("timm", f"stages.{stage}.pos_emb", modules, leaf)
    raise torch_keys.no_such_variable("MCi", path)

  return key_map


def repmixer_key(layout: str, prefix: str, modules: list[str], leaf: str) -> OfficialKey:
  """A variable of the layers of `mobileone`, or of an attention block, below `prefix`.

  Args:
    layout: "official" or "timm".
    prefix: of the block in the checkpoint.
    modules: our names below the block.
    leaf: our name of the variable.
  """
  names = _BRANCHES[layout]
  module = modules[-1]
  if leaf == "gamma":
    # (C, 1, 1) there.
    scale = names["layer_scale"].replace("layer_scale", module)
    name = ".".join((prefix, *modules[:-1], scale))
    return OfficialKey(name, np.ravel, lambda x: x[:, None, None])
  if module in ("reduce", "expand"):
    layer = module if layout == "official" else {"reduce": "fc1", "expand": "fc2"}[module]
    return torch_keys.pointwise(".".join((prefix, *modules[:-1], layer)), leaf)
  place = [names.get(m, m) for m in modules]
  if modules[-2:] == ["token_mixer", "norm"]:
    place.append(names["skip_norm"])
  elif module == "norm" and len(modules) > 1:
    place[-1] = "bn"
  name = ".".join((prefix, *place))
  if leaf in ("scale", "mean", "var") or module.endswith("norm"):
    return torch_keys.norm(name, leaf)
  if module in ("qkv", "proj"):
    return torch_keys.dense(name, leaf)
  return _any_convolution(name, leaf)


def _downsample(prefix: str, modules: list[str]) -> tuple[str, list[str], str]:
  """(prefix, modules below it, "large" or "pointwise"): the step's two halves are a list there."""
  if modules[0] == "pointwise":
    return f"{prefix}.1", modules[1:], "pointwise"
  return f"{prefix}.0", modules, "large"


def _any_convolution(name: str, leaf: str) -> OfficialKey:
  """A convolution there; ours is a matrix where it is 1x1 and not depthwise."""
  if leaf != "kernel":
    return OfficialKey(f"{name}.{leaf}")

  def to_ours(x: np.ndarray) -> np.ndarray:
    return x[:, :, 0, 0].T if x.shape[2:] == (1, 1) and x.shape[1] > 1 else x.transpose(2, 3, 1, 0)

  def to_theirs(x: np.ndarray) -> np.ndarray:
    return x.T[:, :, None, None] if x.ndim == 2 else x.transpose(3, 2, 0, 1)

  return OfficialKey(f"{name}.weight", to_ours, to_theirs)


def merged_arguments(model: object, names: Iterable[str]) -> dict[str, bool]:
  """A file whose branches are merged says so by its names."""
  del model
  return {"reparameterized": True} if any("reparam" in name for name in names) else {}


def _zero_bias(model: MCi) -> dict[str, np.ndarray]:
  if model.head_bias or not model.num_classes:
    return {}
  return {"head.fc.bias": np.zeros((model.num_classes,), np.float32)}


LAYOUTS = {
  "official": Layout(
    official_key_map,
    # A file of MobileCLIP holds the text tower too.
    not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|^text_encoder\.|^logit_scale$",
    rename=lambda name: name.removeprefix("image_encoder.model."),
    arguments=merged_arguments,
  ),
  "timm": Layout(
    timm_key_map,
    not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|^text\.|^logit_scale$",
    rename=lambda name: name.removeprefix("visual.trunk."),
    constants=_zero_bias,
    arguments=merged_arguments,
  ),
}
