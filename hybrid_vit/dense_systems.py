"""Published backbones with their decoders: what was published of them, and what is counted here.

    python -m hybrid_vit.tools.summarize_dense --docs=docs

A row's network and decoder are those of its recipe in `configs/`, so that what is counted is what
is trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hybrid_vit import build, config_files
from hybrid_vit.config import Config, load_config
from hybrid_vit.heads.dense_model import DenseModel


@dataclasses.dataclass(frozen=True)
class DenseSystem:
  """A backbone with a decoder on ADE20K.

  Attributes:
    recipe: file in `configs/` and variant.
    backbone: name in the registry.
    decoder: name of the head.
    counted_on: (height, width) of the picture whose multiply-adds were published.
    parameters: published, in millions, as rounded there; None where none was.
    multiply_adds: published, in 10^9.
    mean_iou: published, of one scale.
    mean_iou_multi_scale: published, of several scales and mirror images.
    source: where the figures come from.
  """

  recipe: str
  backbone: str
  decoder: str
  counted_on: tuple[int, int]
  parameters: float | None
  multiply_adds: float | None
  mean_iou: float | None
  mean_iou_multi_scale: float | None
  source: str

  def build(self) -> DenseModel:
    """The model, for 150 classes."""
    return recipe_model(self.recipe)


def recipe_model(recipe: str) -> Any:
  """The model that a recipe trains, without opening any data.

  Args:
    recipe: "focalnet_ade20k:focalnet_tiny_lrf", a file in `configs/` and a variant of it.

  Raises:
    ConfigError: there is no such file or variant.
  """
  name, _, variant = recipe.partition(":")
  config = Config(load_config(config_files.find_config(name), variant or None))
  tasks, _ = build.build_tasks(config, build.DataFacts(), build.preprocessing_of(config), None)
  return tasks[-1].model


def dense_systems() -> list[DenseSystem]:
  """Every published row that is known, and those of plain encoders of which none was."""
  return [
    *_of_upernet("focalnet_ade20k", "arXiv:2203.11926, table 8", _FOCALNET),
    *_of_upernet("smt_ade20k", "AFeng-x/SMT, README", _SMT),
    *_of_upernet("l2vit_ade20k", "no figures were published in the code", _L2VIT),
    *_of_upernet("revcol_ade20k", "megvii-research/RevCol, README", _REVCOL),
    *_of_upernet("swin_ade20k", "arXiv:2203.11926, table 8, and the authors' code", _SWIN),
    *_of_upernet("swin_ade20k", "facebookresearch/ConvNeXt", _CONVNEXT),
    *(
      DenseSystem(
        f"moat_ade20k:{name}", name, "deeplabv3plus", (size, size), millions, None, iou, None,
        "a list of published results on ADE20K",
      )
      for name, size, millions, iou in _MOAT
    ),
    DenseSystem(
      "clip_ade20k:vit_b16", "vit_b16", "upernet", (512, 512), None, None, None, None,
      "arXiv:2405.08911 was not at hand",
    ),
    DenseSystem(
      "clip_ade20k:mci2", "mci2", "semantic_fpn", (512, 512), None, None, None, None,
      "arXiv:2405.08911 was not at hand; 6.1 times smaller than Swin-L's 234 million: 38",
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


def _of_upernet(file: str, source: str, rows: list[_Row]) -> list[DenseSystem]:
  return [
    DenseSystem(
      f"{file}:{name}",
      name,
      "upernet",
      (size, 4 * size),
      millions,
      billions,
      iou,
      several,
      source,
    )
    for name, size, millions, billions, iou, several in rows
  ]
