"""Writes golden files of the baselines: transformers' networks under weights made by rule.

    pip install torch transformers
    python -m tests.make_baseline_goldens [family ...]

The test suite needs neither: what this wrote is committed beside it. One function a family gives
its runs; the form of the files is that of `tests/golden.py`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers

from tests import golden


@dataclasses.dataclass
class Run:
  """One network and one input.

  Attributes:
    name: of the files.
    model: in evaluation mode; its weights are replaced.
    arguments: what the network was built from.
    shape: of the input, (batch, height, width, 3).
    answers: from the network and the input (batch, 3, height, width) to named tensors, in the order
      of computation: maps as (batch, height, width, channels), everything else as it is.
    weight_transform: changes to the rule's weights, as `golden.weights` applies them.
  """

  name: str
  model: torch.nn.Module
  arguments: dict[str, Any]
  shape: tuple[int, ...]
  answers: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]]
  weight_transform: tuple[dict[str, Any], ...] = ()


def pvt() -> Iterator[Run]:
  """PVT. The norms of its patch embeddings and reductions have the authors' epsilon, 1e-5."""

  def answers(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x, output_hidden_states=True)
    depths, found, size = model.config.depths, {}, x.shape[2:]
    for stage, patch in enumerate(model.config.patch_sizes):
      size = [n // patch for n in size]
      tokens = out.hidden_states[sum(depths[: stage + 1]) - 1]
      tokens = tokens[:, tokens.shape[1] - size[0] * size[1] :]
      found[f"stage{stage + 1}"] = tokens.reshape(len(x), *size, -1)
    return {**found, "logits": out.logits}

  small = {
    "image_size": 64,
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [16, 24, 32, 48],
    "num_attention_heads": [1, 2, 4, 3],
    "mlp_ratios": [4, 3, 2, 2],
  }
  for name, size, arguments in (
    ("small_64", 64, {**small, "sequence_reduction_ratios": [8, 4, 2, 1]}),
    (
      "small_no_bias_64",
      64,
      {**small, "qkv_bias": False, "sequence_reduction_ratios": [4, 4, 1, 1]},
    ),
    ("pvt_tiny_224", 224, {"depths": [2, 2, 2, 2], "num_labels": 1000}),
  ):
    arguments = {"num_labels": 10, "layer_norm_eps": 1e-6, **arguments}
    model = transformers.PvtForImageClassification(transformers.PvtConfig(**arguments))
    for key, module in model.named_modules():
      if key.endswith(("self.layer_norm", *(f"patch_embeddings.{i}.layer_norm" for i in range(4)))):
        module.eps = 1e-5
    yield Run(name, model, arguments, (2 if size < 224 else 1, size, size, 3), answers)


def vit() -> Iterator[Run]:
  """ViT, DeiT-Ti, a distilled one, CLIP's tower; the rule's positions are too small to test."""

  def answers(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x, output_hidden_states=True, interpolate_pos_encoding=True)
    patch, found = model.config.patch_size, {}
    for i, tokens in enumerate(out.hidden_states[1:]):
      found[f"stage1_block{i}_token"] = tokens[:, 0]
      distilled = "distillation_logits" in out
      if distilled:
        found[f"stage1_block{i}_distillation_token"] = tokens[:, 1]
      map_shape = (len(x), x.shape[2] // patch, x.shape[3] // patch, -1)
      found[f"stage1_block{i}"] = tokens[:, 1 + distilled :].reshape(map_shape)
    if distilled:
      heads = {"class_logits": out.cls_logits, "distillation_logits": out.distillation_logits}
      return {**found, **heads, "logits": out.logits}
    return {**found, "logits": out.image_embeds if "image_embeds" in out else out.logits}

  small = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
  }
  tiny = {**small, "image_size": 224, "hidden_size": 192, "num_hidden_layers": 12}
  changes = (
    {"pattern": "position_embedding|cls_token|class_embedding|distillation_token", "scale": 10.0},
  )
  for name, size, arguments in (
    ("small_64", (64, 64), small),
    ("small_larger_96x64", (96, 64), small),
    ("small_smaller_48x32", (48, 32), small),
    ("deit_tiny_patch16_224", (224, 224), {**tiny, "intermediate_size": 768}),
  ):
    arguments = {**arguments, "num_labels": 10, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**arguments))
    yield Run(name, model, arguments, (2, *size, 3), answers, changes)
  for name, size, arguments in (
    ("small_distilled_64", (64, 64), small),
    ("small_distilled_larger_96x64", (96, 64), small),
  ):
    arguments = {**arguments, "num_labels": 10, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    distilled = transformers.DeiTForImageClassificationWithTeacher(
      transformers.DeiTConfig(**arguments)
    )
    yield Run(name, distilled, arguments, (2, *size, 3), answers, changes)
  arguments = {**small, "projection_dim": 24, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
  config = transformers.CLIPVisionConfig(**arguments)
  clip = transformers.CLIPVisionModelWithProjection(config)
  yield Run("small_clip_64", clip, arguments, (2, 64, 64, 3), answers, changes)


def swin() -> Iterator[Run]:
  """Swin. Every map but the last, which is one window, is larger than a window."""

  def answers(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}

    def keep(name: str, halves: bool = False) -> Callable[..., None]:
      def hook(module: Any, args: Any, out: Any) -> None:
        tokens, size = (out[0] if isinstance(out, tuple) else out), args[1]
        size = [-(-n // 2) for n in size] if halves else size
        found[name] = tokens.reshape(len(tokens), *size, -1)

      return hook

    hooks = []
    for i, stage in enumerate(model.swin.encoder.layers, start=1):
      for j, block in enumerate(stage.blocks):
        hooks.append(block.register_forward_hook(keep(f"stage{i}_block{j}")))
      if stage.downsample is not None:
        hooks.append(stage.downsample.register_forward_hook(keep(f"stage{i + 1}_merging", True)))
    found["logits"] = model(x).logits
    for hook in hooks:
      hook.remove()
    return found

  small = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
    "num_labels": 10,
  }
  tiny = {"image_size": 224, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_labels": 1000}
  tiny = {**tiny, "num_heads": [3, 6, 12, 24], "window_size": 7}
  for name, shape, arguments in (
    ("small_64", (2, 64, 64, 3), small),
    ("small_odd_70x90", (2, 70, 90, 3), small),
    ("small_window5_no_bias_97x84", (1, 97, 84, 3), {**small, "window_size": 5, "qkv_bias": False}),
    ("swin_tiny_224", (1, 224, 224, 3), tiny),
  ):
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**arguments))
    yield Run(name, model, arguments, shape, answers)


def convnext() -> Iterator[Run]:
  """ConvNeXt. Its last norm has the authors' epsilon, 1e-6, which transformers' default is not."""

  def answers(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return _maps(model, x, model.convnext.embeddings, model.convnext.encoder)

  small = {"depths": [1, 2, 1, 1], "hidden_sizes": [12, 20, 28, 40], "num_labels": 10}
  full = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768], "num_labels": 1000}
  for name, shape, arguments in (
    ("small_64", (2, 64, 64, 3), small),
    ("small_odd_71x93", (2, 71, 93, 3), small),
    ("small_no_layer_scale_64x96", (1, 64, 96, 3), {**small, "layer_scale_init_value": 0.0}),
    ("convnext_tiny_224", (1, 224, 224, 3), full),
  ):
    arguments = {"layer_norm_eps": 1e-6, **arguments}
    config = transformers.ConvNextConfig(**arguments)
    yield Run(name, transformers.ConvNextForImageClassification(config), arguments, shape, answers)


def resnet() -> Iterator[Run]:
  """ResNet with bottlenecks."""

  def answers(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return _maps(model, x, model.resnet.embedder, model.resnet.encoder)

  small = {"embedding_size": 12, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]}
  for name, shape, arguments in (
    ("small_64", (2, 64, 64, 3), {**small, "num_labels": 10}),
    ("small_odd_71x93", (2, 71, 93, 3), {**small, "num_labels": 10}),
    ("resnet50_224", (1, 224, 224, 3), {"num_labels": 1000}),
  ):
    config = transformers.ResNetConfig(**arguments)
    yield Run(name, transformers.ResNetForImageClassification(config), arguments, shape, answers)


def _maps(model: Any, x: torch.Tensor, stem: Any, encoder: Any) -> dict[str, torch.Tensor]:
  """Of a convolutional network the stem's and each block's map, channels last, and the logits."""
  found = {}
  modules = {"stem": stem}
  for i, stage in enumerate(encoder.stages, start=1):
    modules |= {f"stage{i}_block{j}": block for j, block in enumerate(stage.layers)}

  def keep(name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any, out: Any) -> None:
      found[name] = out.permute(0, 2, 3, 1)

    return hook

  hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
  found["logits"] = model(x).logits
  for hook in hooks:
    hook.remove()
  return found


FAMILIES: dict[str, Callable[[], Iterator[Run]]] = {
  "pvt": pvt,
  "vit": vit,
  "swin": swin,
  "convnext": convnext,
  "resnet": resnet,
}


def write(family: str, run: Run) -> None:
  """Sets the weights by the rule, runs, writes `<family>/<name>.json` and `.npz`."""
  state = run.model.state_dict()
  derived = {k: v for k, v in state.items() if not v.is_floating_point() and v.ndim}
  parameters = {k: list(v.shape) for k, v in state.items() if k not in derived}
  rule = {"parameters": parameters, "layout": "torch"}
  if run.weight_transform:
    rule["weight_transform"] = list(run.weight_transform)
  made = golden.weights(rule)
  run.model.load_state_dict({**derived, **{k: torch.from_numpy(v) for k, v in made.items()}})
  run.model.eval()
  x = np.random.RandomState(0).standard_normal(run.shape).astype(np.float32)
  with torch.no_grad():
    answers = run.answers(run.model, torch.from_numpy(x).permute(0, 3, 1, 2))
  arrays: dict[str, np.ndarray] = {}
  for name, tensor in answers.items():
    value = tensor.numpy().astype(np.float32)
    if value.ndim < 4:
      arrays[name] = value
      continue
    arrays[f"{name}_corner"] = value[0, :4, :4, :8]
    arrays[f"{name}_stats"] = np.array([value.mean(), value.std(), np.abs(value).max()], np.float32)
  trainable = sum(p.numel() for p in run.model.parameters())
  versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
  description = {
    "name": run.name,
    "source": f"{versions}: {type(run.model).__name__}",
    "arguments": run.arguments,
    "mode": "eval",
    "input": {"shape": list(run.shape), "seed": 0},
    **rule,
    "derived": sorted(derived),
    "trainable_count": trainable,
  }
  path = golden.DIRECTORY / family / run.name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")
  np.savez_compressed(path.with_suffix(".npz"), **arrays)
  print(path.name, trainable, {k: v.shape for k, v in arrays.items()})


if __name__ == "__main__":
  for family in sys.argv[1:] or FAMILIES:
    for run in FAMILIES[family]():
      write(family, run)
