"""FocalNet: names in the authors' checkpoints, in timm's and in those of `transformers`."""

import re
from collections.abc import Callable, Sequence

import flax.linen as nn

from hybrid_vit.weights import torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey

Linear = Callable[[str, str], OfficialKey]

_MODULATION = {"projection_in": "f", "projection_out": "proj", "projection_context": "h"}


def _official(path: str, linear: Linear) -> OfficialKey:
  """The authors' tensor for one of our variables; `linear` lays out what is a linear layer there.

  Raises:
    ValueError: for a path that FocalNet does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  if scope == "head":
    return torch_keys.dense("head", leaf)
  if scope == "head_norm":
    return torch_keys.norm("norm", leaf)
  if output := re.fullmatch(r"stage(\d+)_norm", scope):
    return torch_keys.norm(f"norm{int(output[1]) - 1}", leaf)
  embedding = re.fullmatch(r"stem|stage(\d+)_embedding", scope)
  if embedding and modules in (["conv"], ["norm"]):
    # There a stage ends with what opens the next one here.
    name = f"layers.{int(embedding[1]) - 2}.downsample" if embedding[1] else "patch_embed"
    if modules == ["norm"]:
      return torch_keys.norm(f"{name}.norm", leaf)
    return torch_keys.conv(f"{name}.proj", leaf)

  block = torch_keys.block_of(scope)
  if block is None or not modules:
    raise torch_keys.no_such_variable("FocalNet", path)
  prefix, module = f"layers.{block[0] - 1}.blocks.{block[1]}", modules[0]
  if module in ("norm1", "norm2"):
    return torch_keys.norm(f"{prefix}.{module}", leaf)
  if module in ("layer_scale1", "layer_scale2"):
    return torch_keys.same(f"{prefix}.gamma_{module[-1]}")
  if module in ("mlp_fc1", "mlp_fc2"):
    return linear(f"{prefix}.mlp.{module[-3:]}", leaf)
  if module != "modulation":
    raise torch_keys.no_such_variable("FocalNet", path)
  inner = modules[1]
  if inner == "norm":
    return torch_keys.norm(f"{prefix}.modulation.ln", leaf)
  if level := re.fullmatch(r"focal_conv_(\d+)", inner):
    return torch_keys.conv(f"{prefix}.modulation.focal_layers.{level[1]}.0", leaf)
  if inner not in _MODULATION:
    raise torch_keys.no_such_variable("FocalNet", path)
  kind = torch_keys.pointwise if inner == "projection_context" else linear
  return kind(f"{prefix}.modulation.{_MODULATION[inner]}", leaf)


Substitutions = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

_TIMM: Substitutions = (
  (r"^patch_embed\.", "stem."),
  (r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),
  (r"\.gamma_(\d)$", r".ls\1.gamma"),
  (r"\.ln\.", ".norm."),
  (r"^head\.", "head.fc."),
)
_TIMM_POST_NORM: Substitutions = ((r"(\.blocks\.\d+\.norm\d)\.", r"\1_post."),)
_TRANSFORMERS: Substitutions = (
  (r"\.modulation\.f\.", ".modulation.projection_in."),
  (r"\.modulation\.h\.", ".modulation.projection_context."),
  (r"\.modulation\.proj\.", ".modulation.projection_out."),
  (r"\.modulation\.ln\.", ".modulation.layernorm."),
  (r"^patch_embed\.proj\.", "focalnet.embeddings.patch_embeddings.projection."),
  (r"^patch_embed\.norm\.", "focalnet.embeddings.norm."),
  (r"^layers\.(\d+)\.blocks\.", r"focalnet.encoder.stages.\1.layers."),
  (r"^layers\.(\d+)\.downsample\.", r"focalnet.encoder.stages.\1.downsample."),
  (r"\.downsample\.proj\.", ".downsample.projection."),
  (r"^norm\.", "focalnet.layernorm."),
  (r"^head\.", "classifier."),
)


def _renamed(linear: Linear, substitutions: Substitutions) -> KeyMap:
  def key_map(path: str) -> OfficialKey:
    def rename(name: str) -> str:
      for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
      return name

    return _official(path, linear).renamed(rename)

  return key_map


def _timm(model: nn.Module) -> KeyMap:
  # timm keeps channels first throughout: its linear layers are 1x1 convolutions.
  post_norm = _TIMM_POST_NORM if getattr(model, "post_norm", False) else ()
  return _renamed(torch_keys.pointwise, (*post_norm, *_TIMM))


LAYOUTS = {
  # The detectors' checkpoints put the network below "backbone.".
  "official": Layout(
    lambda model: _renamed(torch_keys.dense, ()),
    rename=lambda name: re.sub(r"^(module\.)?(backbone\.)?", "", name),
  ),
  "timm": Layout(_timm),
  "transformers": Layout(lambda model: _renamed(torch_keys.dense, _TRANSFORMERS)),
}
