"""ConvNeXt: names of the authors' PyTorch tensors, timm's, transformers' and OpenMMLab's."""

import dataclasses
import functools
import re

from hybrid_vit.weights import convert, torch_keys


@dataclasses.dataclass(frozen=True)
class _Names:
  """How one library calls the parts; {i} is a stage from 0, {j} a block, {s} a stage from 1.

  `output_norm` is a norm beside the trunk, "" where the library has none.
  """

  block: str
  parts: dict[str, str]
  stem: dict[str, str]
  downsample: str
  head_norm: str
  head: str
  output_norm: str


_OFFICIAL = _Names(
  block="stages.{i}.{j}",
  parts={
    "depthwise_conv": "dwconv",
    "norm": "norm",
    "expand": "pwconv1",
    "shrink": "pwconv2",
    "layer_scale": "gamma",
  },
  stem={"conv": "downsample_layers.0.0", "norm": "downsample_layers.0.1"},
  downsample="downsample_layers.{i}",
  head_norm="norm",
  head="head",
  output_norm="norm{i}",  # in the authors' detection and segmentation code
)
_TIMM = _Names(
  block="stages.{i}.blocks.{j}",
  parts={
    "depthwise_conv": "conv_dw",
    "norm": "norm",
    "expand": "mlp.fc1",
    "shrink": "mlp.fc2",
    "layer_scale": "gamma",
  },
  stem={"conv": "stem.0", "norm": "stem.1"},
  downsample="stages.{i}.downsample",
  head_norm="head.norm",
  head="head.fc",
  output_norm="",
)
_TRANSFORMERS = _Names(
  block="convnext.encoder.stages.{i}.layers.{j}",
  parts={
    "depthwise_conv": "dwconv",
    "norm": "layernorm",
    "expand": "pwconv1",
    "shrink": "pwconv2",
    "layer_scale": "layer_scale_parameter",
  },
  stem={
    "conv": "convnext.embeddings.patch_embeddings",
    "norm": "convnext.embeddings.layernorm",
  },
  downsample="convnext.encoder.stages.{i}.downsampling_layer",
  head_norm="convnext.layernorm",
  head="classifier",
  output_norm="hidden_states_norms.stage{s}",
)

# mmpretrain's, which mmsegmentation and mmdetection take.
_OPENMMLAB = dataclasses.replace(
  _OFFICIAL,
  parts={
    "depthwise_conv": "depthwise_conv",
    "norm": "norm",
    "expand": "pointwise_conv1",
    "shrink": "pointwise_conv2",
    "layer_scale": "gamma",
  },
  head="head.fc",
)


def _key(names: _Names, path: str) -> convert.OfficialKey:
  """The library's tensor for one of ours, such as "params/stage1_block0/expand/kernel".

  Raises:
    ValueError: for a path that ConvNeXt does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  if scope == "head_norm":
    return torch_keys.norm(names.head_norm, leaf)
  if scope == "head":
    return torch_keys.dense(names.head, leaf)
  module = modules[0] if modules else ""
  if scope == "stem" and module in names.stem:
    return (torch_keys.norm if module == "norm" else torch_keys.conv)(names.stem[module], leaf)
  if (output := re.fullmatch(r"stage(\d+)_norm", scope)) and names.output_norm:
    stage = int(output[1])
    return torch_keys.norm(names.output_norm.format(i=stage - 1, s=stage), leaf)
  if scope.endswith("_downsample"):
    stage = int(scope.removeprefix("stage").removesuffix("_downsample")) - 1
    name = names.downsample.format(i=stage)
    if module == "norm":
      return torch_keys.norm(f"{name}.0", leaf)
    return torch_keys.conv(f"{name}.1", leaf)
  block = torch_keys.block_of(scope)
  if block is None or module not in names.parts:
    raise torch_keys.no_such_variable("ConvNeXt", path)
  name = f"{names.block.format(i=block[0] - 1, j=block[1])}.{names.parts[module]}"
  if module == "layer_scale":
    return torch_keys.same(name)
  if module == "norm":
    return torch_keys.norm(name, leaf)
  return (torch_keys.conv if module == "depthwise_conv" else torch_keys.dense)(name, leaf)


def _layout(names: _Names) -> convert.Layout:
  return convert.Layout(lambda _: functools.partial(_key, names))


LAYOUTS = {
  "official": _layout(_OFFICIAL),
  "timm": _layout(_TIMM),
  "transformers": _layout(_TRANSFORMERS),
  "openmmlab": _layout(_OPENMMLAB),
}
