"""Published backbones with their decoders: what was published of them, and what is counted here.

    python -m hybrid_vit.tools.summarize_dense --docs=docs

A row's network and decoder are those of its recipe in `configs/`, so that what is counted is what
is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybrid_vit.heads.dense_model import DenseModel, create_dense_model
from hybrid_vit.models.dense import dense_arguments, enlarged_windows
from hybrid_vit.models.registry import create_model

CLASSES = 150
_FCN = {"name": "fcn", "channels": 256}
_UPERNET: Mapping[str, Any] = {"head": {"name": "upernet", "channels": 512}, "auxiliary": _FCN}
_UPERNET_768: Mapping[str, Any] = {"head": {"name": "upernet", "channels": 768}, "auxiliary": _FCN}
_UPERNET_1440: Mapping[str, Any] = {
  "head": {"name": "upernet", "channels": 1440},
  "auxiliary": _FCN,
}
_DEEPLAB: Mapping[str, Any] = {"head": {"name": "deeplabv3plus"}}
_SEMANTIC_FPN: Mapping[str, Any] = {"neck": {"name": "fpn"}, "head": {"name": "semantic_fpn"}}


@dataclasses.dataclass(frozen=True)
class DenseSystem:
  """A backbone with a decoder on ADE20K.

  Attributes:
    backbone: name in the registry.
    decoder: name of the head.
    image_size: side of the training crop.
    counted_on: (height, width) of the picture whose multiply-adds were published.
    parameters: published, in millions, as rounded there; None where none was.
    multiply_adds: published, in 10^9.
    mean_iou: published, of one scale.
    mean_iou_multi_scale: published, of several scales and mirror images.
    source: where the figures come from.
    parts: fields of `create_dense_model`.
  """

  backbone: str
  decoder: str
  image_size: int
  counted_on: tuple[int, int]
  parameters: float | None
  multiply_adds: float | None
  mean_iou: float | None
  mean_iou_multi_scale: float | None
  source: str
  parts: Mapping[str, Any]

  def build(self) -> DenseModel:
    """The model, for 150 classes."""
    arguments = dense_arguments(self.backbone, self.image_size)
    if self.backbone.startswith("focalnet"):
      arguments["focal_windows"] = enlarged_windows(self.backbone)
    backbone = create_model(self.backbone, num_classes=0, **arguments)
    return create_dense_model(backbone, CLASSES, **self.parts)


def dense_systems() -> list[DenseSystem]:
  """Every published row that is known, and those of plain encoders of which none was."""
  return [
    *_of_upernet("arXiv:2203.11926, table 8", _FOCALNET),
    *_of_upernet("AFeng-x/SMT, README", _SMT),
    *_of_upernet("no figures were published in the code", _L2VIT),
    *_of_upernet("megvii-research/RevCol, README", _REVCOL),
    *_of_upernet("arXiv:2203.11926, table 8, and the authors' code", _SWIN),
    *_of_upernet("facebookresearch/ConvNeXt", _CONVNEXT),
    *(
      DenseSystem(
        name, "deeplabv3plus", size, (size, size), millions, None, iou, None,
        "a list of published results on ADE20K", _DEEPLAB,
      )
      for name, size, millions, iou in _MOAT
    ),
    DenseSystem(
      "vit_b16", "upernet", 512, (512, 512), None, None, None, None,
      "arXiv:2405.08911 was not at hand", _UPERNET_768,
    ),
    DenseSystem(
      "mci2", "semantic_fpn", 512, (512, 512), None, None, None, None,
      "arXiv:2405.08911 was not at hand; 6.1 times smaller than Swin-L's 234 million: 38",
      _SEMANTIC_FPN,
    ),
  ]  # fmt: skip


# Name, crop, parameters in millions, multiply-adds in 10^9, mIoU of one scale and of several.
_Row = tuple[str, int, float | None, float | None, float | None, float | None]
_FOCALNET: list[_Row] = [
  ("focalnet_tiny_srf", 512, 61, 944, 46.5, 47.2),
  ("focalnet_tiny_lrf", 512, 61, 949, 46.8, 47.8),
  ("focalnet_tiny_srf_deep", 512, 55, 934, 47.4, 48.5),
  ("focalnet_small_srf", 512, 83, 1035, 49.3, 50.1),
  ("focalnet_small_lrf", 512, 84, 1044, 49.1, 50.1),
  ("focalnet_small_srf_deep", 512, 69, 986, 49.4, 50.3),
  ("focalnet_base_srf", 512, 124, 1180, 50.2, 51.1),
  ("focalnet_base_lrf", 512, 126, 1192, 50.5, 51.4),
]
_SMT: list[_Row] = [("smt_s", 512, 50, 935, 49.2, 50.2), ("smt_b", 512, 62, 1004, 49.6, 50.6)]
_L2VIT: list[_Row] = [
  (f"l2vit_{size}", 512, None, None, None, None) for size in ("tiny", "small", "base")
]
_REVCOL: list[_Row] = [
  ("revcol_tiny", 512, 60, 937, 47.4, 47.6),
  ("revcol_small", 512, 90, 1031, 47.9, 49.0),
  ("revcol_base", 512, 122, 1169, 49.0, 50.1),
  ("revcol_base_22k", 640, 122, 1827, 52.7, 53.3),
  ("revcol_large_22k", 640, 306, 2610, 53.4, 53.7),
  ("revcol_huge", 640, 2421, None, 57.8, 58.0),
]
_SWIN: list[_Row] = [
  ("swin_tiny", 512, 60, 945, 44.5, None),
  ("swin_small", 512, 81, 1038, 47.6, None),
  ("swin_base", 512, 121, 1188, 48.1, None),
]
_CONVNEXT: list[_Row] = [
  ("convnext_tiny", 512, 60, 939, 46.0, None),
  ("convnext_small", 512, 82, 1027, 48.7, None),
  ("convnext_base", 512, 122, 1170, 49.1, None),
]
# Name, crop, parameters in millions, mIoU.
_MOAT: list[tuple[str, int, float | None, float | None]] = [
  ("tiny_moat_0", 512, 6, 41.2),
  ("tiny_moat_1", 512, 8, 43.1),
  ("tiny_moat_2", 512, 13, 44.9),
  ("tiny_moat_3", 512, 24, 47.5),
  ("moat_0", 641, None, None),
  ("moat_1", 641, None, None),
  ("moat_2", 641, 81, 54.7),
  ("moat_3", 641, 198, 56.5),
  ("moat_4", 641, 496, 57.6),
]


def _of_upernet(source: str, rows: list[_Row]) -> list[DenseSystem]:
  return [
    DenseSystem(
      name,
      "upernet",
      size,
      (size, 4 * size),
      millions,
      billions,
      iou,
      several,
      source,
      _UPERNET_1440 if name == "revcol_huge" else _UPERNET,
    )
    for name, size, millions, billions, iou, several in rows
  ]
