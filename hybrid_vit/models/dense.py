"""The published dense forms of registered networks: backbones of detection, segmentation, depth.

    model = create_model(name, num_classes=0, **dense_arguments(name, image_size))

Its `features` are the maps that necks and heads read, finest first, and no parameter is left that
only a classifier reads. What the papers and the authors' code for dense tasks do:

* FocalNet, L2ViT, Swin, ConvNeXt, CSWin: a layer norm of each stage's output, beside the trunk.
* FocalNet pads maps to whole patches and its overlapping stem by 3. Larger kernels are a recipe's
  own, see `enlarged_windows`.
* Swin pads maps smaller than a window instead of shrinking the window; L2ViT's windows are of 7x7
  in all sizes.
* MOAT pools its shortcuts over 3x3, and on large pictures attends in windows of 14x14 that do not
  shift (paper, section 4.2); smaller ones it reads globally.
* ViT has no pyramid: four blocks' maps of one stride, at even distances in the last two thirds (3,
  5, 7, 11 of 12), as MAE's and BEiT's segmentation has it; positions for the picture's size.
  `vitdet_arguments` is another form, for detection.
* RevCol: the last column's maps, without heads and decoders, with plain gradients; the largest
  network's depthwise kernels are 7x7.
* PVT has no class token. MCi has no last convolution before the pooling.
* SMT, whose stages end with norms of the trunk, CvT (three maps, of stride 4, 8, 16) and ResNet are
  what they are.

A map has the picture's sides over its stride, rounded up. Where the authors' networks round
otherwise, so do these: ConvNeXt, RevCol and PVT down; CvT, CSWin and SMT give (n + 1) // 4 cells in
the first stage, and from there half of them, rounded up.

Differences from the authors' code: CvT keeps its class token in the last stage, which no map holds
(there is no official dense form); MCi has no batch norm of its outputs, as FastViT's code has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_vit.models.registry import create_model, model_entry

# The largest picture that is read with global attention: the crop of the published segmentation.
_LARGEST_GLOBAL = 641
_MOAT_WINDOW = 14
# The author's code for dense tasks takes no other; no parameter depends on it.
_L2VIT_WINDOW = 7
_VITDET_WINDOW, _VITDET_GLOBAL = 14, 4


def dense_arguments(
  name: str, image_size: int, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Arguments of `create_model(name, num_classes=0, ...)` for the published dense form.

  Args:
    name: in the registry.
    image_size: side of the square pictures in pixels that the network is trained on; it takes
      others too.
    own: further arguments of the network, under those that are returned.

  Raises:
    ValueError: an unknown name; the message gives the closest. A size below 1, or a ViT whose
      depth has no third.
  """
  if image_size < 1:
    raise ValueError(f"dense_arguments: image_size is {image_size}; a number of pixels is expected")
  # Typed loosely: which attributes it has depends on the family.
  model: Any = create_model(name, **(own or {}))
  family = type(model).__name__
  if family in ("ConvNeXt", "CSWin"):
    return {"output_norms": _all_stages(model)}
  if family == "L2ViT":
    return {"output_norms": _all_stages(model), "window_size": _L2VIT_WINDOW}
  if family == "Swin":
    return {"output_norms": _all_stages(model), "shrink_windows": False}
  if family == "FocalNet":
    stem = {"stem_padding": 3} if model.conv_embed else {}
    return {"output_norms": _all_stages(model), "pad_maps": True, **stem}
  if family == "MOAT":
    windows = tuple(
      _MOAT_WINDOW if kind == "moat" and image_size > _LARGEST_GLOBAL else None
      for kind in model.block_types
    )
    return {"pool_size": 3, "window_sizes": windows}
  if family == "VisionTransformer":
    return {
      "output_blocks": _blocks(name, model.depth),
      "position_size": -(-image_size // model.patch_size),
      "pad_maps": True,
    }
  if family == "RevCol":
    kernel = {"kernel_size": 7} if model.bottom_to_top else {}
    return {"reversible": False, "intermediate_supervision": False, **kernel}
  if family == "PVT":
    return {"class_token": False}
  return {"head_expansion": None} if family == "MCi" else {}


def vitdet_arguments(
  name: str, image_size: int, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Arguments of a plain transformer as the backbone of detection that ViTDet publishes.

  Windows of 14x14, four blocks at even distances that attend globally, relative positions, the last
  block's map alone, without a class token or last norm (arXiv:2203.16527, section 3). Absolute
  positions keep the size of the pretraining and are resized within the network. The neck that
  belongs to it is "simple_pyramid"; `heads.rcnn.VITDET` has it with the heads.

  Args:
    name: in the registry.
    image_size: side of the square pictures in pixels that the network is trained on, published:
      1024; it takes others too.
    own: further arguments of the network, under those that are returned.

  Raises:
    ValueError: an unknown name, a network that is no ViT, a size below 1, or fewer blocks than
      four.
  """
  if image_size < 1:
    raise ValueError(f"vitdet_arguments: image_size is {image_size}; pixels are expected")
  model: Any = create_model(name, **(own or {}))
  if type(model).__name__ != "VisionTransformer":
    raise ValueError(f"vitdet_arguments: {name} is a {type(model).__name__}; a ViT is expected")
  if model.depth < _VITDET_GLOBAL:
    raise ValueError(
      f"vitdet_arguments: {name} has {model.depth} blocks; {_VITDET_GLOBAL} attend globally"
    )
  return {
    "class_token": False,
    "distillation_token": False,
    "pool": "mean",
    "output_blocks": (model.depth - 1,),
    "pad_maps": True,
    "window_size": _VITDET_WINDOW,
    "global_blocks": tuple(
      model.depth * (i + 1) // _VITDET_GLOBAL - 1 for i in range(_VITDET_GLOBAL)
    ),
    "relative_size": -(-image_size // model.patch_size),
  }


def enlarged_windows(name: str, first: int | Sequence[int] = 9) -> tuple[int, ...]:
  """`focal_windows` of a FocalNet with larger kernels, as its recipes for dense tasks have it.

  The first level's kernel grows to `first`, the next ones with it: from 3, 5, 7 to 9, 11, 13. The
  weights of the smaller kernels get zeros around them (`weights.transfer`).

  Args:
    name: in the registry.
    first: of each stage, or one for all: 9 in Mask R-CNN and UPerNet, (11, 9, 9, 7) in Cascade
      Mask R-CNN, Sparse R-CNN and ATSS (paper, section 4.3, and the authors' configurations).

  Raises:
    ValueError: an unknown name, a network that is no FocalNet, another number of stages, or a
      kernel that is even or smaller than the network's own.
  """
  own = getattr(create_model(name), "focal_windows", None)
  if own is None:
    family = model_entry(name).module_class.__name__
    raise ValueError(f"enlarged_windows: {name} is a {family}; a FocalNet is expected")
  windows = (first,) * len(own) if isinstance(first, int) else tuple(first)
  if len(windows) != len(own):
    raise ValueError(f"enlarged_windows: {name} has {len(own)} stages; first is {windows}")
  for window, before in zip(windows, own):
    if window % 2 == 0 or window < before:
      raise ValueError(
        f"enlarged_windows: a kernel of {window} where {name} has {before}; an odd one that is no "
        "smaller is expected"
      )
  return windows


def _all_stages(model: Any) -> tuple[int, ...]:
  return tuple(range(1, len(model.depths) + 1))


def _blocks(name: str, depth: int) -> tuple[int, ...]:
  """3, 5, 7, 11 of 12 blocks; 7, 11, 15, 23 of 24."""
  if depth < 3:
    raise ValueError(
      f"dense_arguments: {name} has {depth} blocks; at least 3 are needed to take the maps of four"
    )
  return tuple(sorted({depth * sixths // 6 - 1 for sixths in (2, 3, 4, 6)}))
