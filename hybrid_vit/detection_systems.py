"""Published detectors on COCO: what was published of them, beside what is counted here.

    python -m hybrid_vit.tools.summarize_dense --task=detection --docs=docs

A row's network and detector are those of its recipe in `configs/`, so that what is counted is what
is trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hybrid_vit.dense_systems import recipe_model

_PICTURE = (800, 1280)


@dataclasses.dataclass(frozen=True)
class DetectionSystem:
  """A backbone with a detector on COCO.

  Attributes:
    recipe: file in `configs/` and variant.
    parameters: published, in millions, as there: "48.6" is rounded to a tenth. "" where none was.
    multiply_adds: published, in 10^9; None where none was.
    box_ap: published, on the validation part, of one scale.
    mask_ap: likewise.
    source: where the figures come from.
    counted_on: (height, width) of the picture whose multiply-adds were published.
  """

  recipe: str
  parameters: str
  multiply_adds: float | None
  box_ap: float | None
  mask_ap: float | None
  source: str
  counted_on: tuple[int, int] = _PICTURE

  def build(self) -> Any:
    """The detector."""
    return recipe_model(self.recipe)


def detection_systems() -> list[DetectionSystem]:
  """Every published row that has a recipe, and those of L2ViT and MCi, of which none was."""
  return [
    *_rows("focalnet_coco", "arXiv:2203.11926, tables 6 and 8", _FOCALNET),
    *_rows("focalnet_coco", "IDEA-Research/detrex, README", _FOCALNET_DETREX),
    *_rows("focalnet_coco", "arXiv:2203.11926, table 11, and FocalNet-DINO", _FOCALNET_LARGEST),
    *_rows("smt_coco", "AFeng-x/SMT, README; smt_s 1x: arXiv:2309.11523, smt_b 1x recalled", _SMT),
    *_rows("l2vit_coco", "no figures were published in the code", _L2VIT),
    *_rows("revcol_coco", "megvii-research/RevCol, README", _REVCOL),
    *_rows("moat_coco", "arXiv:2210.01820; of moat_0 to 2 recalled", _MOAT, (1344, 1344)),
    *_rows("clip_coco", "arXiv:2405.08911 was not at hand", _CLIP),
    *_rows("swin_coco", "SwinTransformer/Swin-Transformer-Object-Detection, README", _SWIN),
    *_rows("swin_coco", "arXiv:2405.08768, table 17", _EFFICIENTTRAIN),
    *_rows("swin_coco", "facebookresearch/ConvNeXt, README", _CONVNEXT),
  ]


# Variant, parameters in millions, multiply-adds in 10^9, AP of boxes and of masks.
_Row = tuple[str, str, float | None, float | None, float | None]
# The paper's order: 1x, then 3x.
_FOCALNET: list[_Row] = [
  (f"mask_rcnn_focalnet_{name}_{schedule}", millions, billions, ap[0], ap[1])
  for name, millions, billions, *of_schedules in (
    ("tiny_srf", "48.6", 267, (45.9, 41.3), (47.6, 42.6)),
    ("tiny_lrf", "48.9", 268, (46.1, 41.5), (48.0, 42.9)),
    ("tiny_srf_deep", "45.8", 261, (46.8, 41.9), (48.5, 43.3)),
    ("small_srf", "70.8", 356, (48.0, 42.7), (48.9, 43.6)),
    ("small_lrf", "72.3", 365, (48.3, 43.1), (49.3, 43.8)),
    ("small_srf_deep", "59.5", 312, (48.1, 43.1), (49.2, 43.8)),
    ("base_srf", "109.4", 496, (48.8, 43.3), (49.6, 44.1)),
    ("base_lrf", "111.4", 507, (49.0, 43.5), (49.8, 44.1)),
    ("base_srf_deep", "107.1", 481, (49.6, 44.0), (50.2, 44.3)),
  )
  for schedule, ap in zip(("1x", "3x"), of_schedules)
] + [
  ("cascade_mask_rcnn_focalnet_tiny_srf_3x", "86.4", 746, 51.5, None),
  ("cascade_mask_rcnn_focalnet_tiny_lrf_3x", "87.1", 751, 51.5, None),
  ("atss_focalnet_tiny_srf_3x", "36.5", 215, 49.2, None),
  ("atss_focalnet_tiny_lrf_3x", "37.2", 220, 49.6, None),
  ("sparse_rcnn_focalnet_tiny_srf_3x", "110.5", 172, 49.6, None),
  ("sparse_rcnn_focalnet_tiny_lrf_3x", "111.2", 178, 49.9, None),
]
_FOCALNET_DETREX: list[_Row] = [
  ("dino_focalnet_large_fl3_1x", "", None, 57.5, None),
  ("dino_focalnet_large_fl3_3x", "", None, 58.3, None),
  ("dino_focalnet_large_fl4_1x", "", None, 58.0, None),
  ("dino_5scale_focalnet_large_fl4_1x", "", None, 58.5, None),
]
_FOCALNET_LARGEST: list[_Row] = [
  ("dino_5scale_focalnet_large_fl4_finetune", "", None, 63.5, None),
  ("dino_5scale_focalnet_huge_fl4_finetune", "746", None, 64.0, None),
]
_SMT: list[_Row] = [
  ("mask_rcnn_smt_s_1x", "40", 265, 47.8, 43.0),
  ("mask_rcnn_smt_b_1x", "52", 328, 49.0, None),
  ("mask_rcnn_smt_s_3x", "40", 265, 49.0, 43.4),
  ("mask_rcnn_smt_b_3x", "52", 328, 49.8, 44.0),
  ("cascade_mask_rcnn_smt_s_3x", "78", 744, 51.9, 44.7),
  ("retinanet_smt_s_3x", "30", 247, 47.3, None),
  ("atss_smt_s_3x", "28", 214, 49.9, None),
  ("sparse_rcnn_smt_s_3x", "102", 171, 50.2, None),
  ("dino_smt_s_1x", "40", 309, 54.0, None),
]
_L2VIT: list[_Row] = [
  (f"{detector}_l2vit_{size}_1x", "", None, None, None)
  for detector in ("mask_rcnn", "retinanet")
  for size in ("tiny", "small", "base")
]
_REVCOL: list[_Row] = [
  ("revcol_tiny", "88", 741, 50.8, 44.0),
  ("revcol_small", "118", 833, 52.6, 45.5),
  ("revcol_base", "196", 988, 53.0, 45.9),
  ("revcol_base_22k", "196", 988, 55.0, 47.5),
  ("revcol_large_22k", "330", 1453, 55.9, 48.4),
]
_MOAT: list[_Row] = [
  ("moat_0", "65", 799, 55.9, 47.4),
  ("moat_1", "79", 921, 57.7, 49.0),
  ("moat_2", "110", 1217, 58.5, 49.3),
  ("moat_3", "227", 2216, 59.2, 50.3),
]
_CLIP: list[_Row] = [
  (name, "", None, None, None) for name in ("vit_b16", "vit_b16_cascade", "mci0", "mci1", "mci2")
]
_SWIN: list[_Row] = [
  ("mask_rcnn_swin_tiny_1x", "48", 267, 43.7, 39.8),
  ("mask_rcnn_swin_tiny_3x", "48", 267, 46.0, 41.6),
  ("mask_rcnn_swin_small_3x", "69", 359, 48.5, 43.3),
  ("cascade_mask_rcnn_swin_tiny_1x", "86", 745, 48.1, 41.7),
  ("cascade_mask_rcnn_swin_tiny_3x", "86", 745, 50.4, 43.7),
  ("cascade_mask_rcnn_swin_small_3x", "107", 838, 51.9, 45.0),
  ("cascade_mask_rcnn_swin_base_3x", "145", 982, 51.9, 45.0),
]
# With plain weights; by EfficientTrain see the recipe.
_EFFICIENTTRAIN: list[_Row] = [
  ("retinanet_swin_tiny_1x", "", None, 41.7, None),
  ("cascade_mask_rcnn_swin_small_1x", "", None, 50.0, 43.1),
  ("cascade_mask_rcnn_swin_base_1x", "", None, 50.9, 44.0),
]
_CONVNEXT: list[_Row] = [
  ("mask_rcnn_convnext_tiny_3x", "48", 262, 46.2, 41.7),
  ("cascade_mask_rcnn_convnext_tiny_3x", "86", 741, 50.4, 43.7),
  ("cascade_mask_rcnn_convnext_small_3x", "108", 827, 51.9, 45.0),
  ("cascade_mask_rcnn_convnext_base_3x", "146", 964, 52.7, 45.6),
  ("cascade_mask_rcnn_convnext_base_22k_3x", "146", 964, 54.0, 46.9),
  ("cascade_mask_rcnn_convnext_large_22k_3x", "255", 1354, 54.8, 47.6),
  ("cascade_mask_rcnn_convnext_xlarge_22k_3x", "407", 1898, 55.2, 47.7),
]


def _rows(
  file: str, source: str, rows: list[_Row], counted_on: tuple[int, int] = _PICTURE
) -> list[DetectionSystem]:
  return [
    DetectionSystem(f"{file}:{name}", millions, billions, box, mask, source, counted_on)
    for name, millions, billions, box, mask in rows
  ]
