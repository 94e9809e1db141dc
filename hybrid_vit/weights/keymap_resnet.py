"""ResNet: names of torchvision's tensors, which timm shares, and of transformers'."""

from hybrid_vit.weights import convert, torch_keys


def official_key(path: str) -> convert.OfficialKey:
  """torchvision's tensor for one of ours, such as "params/stage1_block0/conv2/kernel".

  Raises:
    ValueError: for a path that ResNet does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  if scope == "head":
    return torch_keys.dense("fc", leaf)
  if scope == "stem" and modules == ["conv"]:
    return torch_keys.conv("conv1", leaf)
  if scope == "stem" and modules == ["norm"]:
    return torch_keys.norm("bn1", leaf)
  block = torch_keys.block_of(scope)
  if block is None or not modules:
    raise torch_keys.no_such_variable("ResNet", path)
  prefix, module = f"layer{block[0]}.{block[1]}", modules[0]
  if module == "shortcut_conv":
    return torch_keys.pointwise(f"{prefix}.downsample.0", leaf)
  if module == "shortcut_norm":
    return torch_keys.norm(f"{prefix}.downsample.1", leaf)
  if module.startswith("norm"):
    return torch_keys.norm(f"{prefix}.bn{module.removeprefix('norm')}", leaf)
  if module == "conv2":
    return torch_keys.conv(f"{prefix}.conv2", leaf)
  return torch_keys.pointwise(f"{prefix}.{module}", leaf)


def transformers_key(path: str) -> convert.OfficialKey:
  """The same for `ResNetForImageClassification` of transformers.

  Raises:
    ValueError: for a path that ResNet does not have.
  """
  _, scope, *modules, leaf = path.split("/")
  if scope == "head":
    return torch_keys.dense("classifier.1", leaf)
  stem = "resnet.embedder.embedder"
  if scope == "stem" and modules == ["conv"]:
    return torch_keys.conv(f"{stem}.convolution", leaf)
  if scope == "stem" and modules == ["norm"]:
    return torch_keys.norm(f"{stem}.normalization", leaf)
  block = torch_keys.block_of(scope)
  if block is None or not modules:
    raise torch_keys.no_such_variable("ResNet", path)
  prefix, module = f"resnet.encoder.stages.{block[0] - 1}.layers.{block[1]}", modules[0]
  part = "shortcut" if module.startswith("shortcut") else f"layer.{int(module[-1]) - 1}"
  if "norm" in module:
    return torch_keys.norm(f"{prefix}.{part}.normalization", leaf)
  factory = torch_keys.conv if module == "conv2" else torch_keys.pointwise
  return factory(f"{prefix}.{part}.convolution", leaf)


LAYOUTS = {
  "official": convert.Layout(lambda _: official_key, not_weights=torch_keys.BATCH_NORM_COUNTER),
  "timm": convert.Layout(lambda _: official_key, not_weights=torch_keys.BATCH_NORM_COUNTER),
  "transformers": convert.Layout(
    lambda _: transformers_key, not_weights=torch_keys.BATCH_NORM_COUNTER
  ),
}
